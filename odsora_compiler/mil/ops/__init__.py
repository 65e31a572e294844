"""The operations of MIL that the interpreter knows, one table per theme; see `definition`."""
