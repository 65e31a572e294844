"""The operations of MIL, one table per theme."""
