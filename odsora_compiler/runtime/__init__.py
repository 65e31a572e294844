"""Running bundles: reading them, executing chunks, the schedule, and checking what was lowered."""
