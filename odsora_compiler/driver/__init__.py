"""All stages in a row: lowering to an output path, and holding the result to its program."""
