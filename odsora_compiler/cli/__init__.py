"""The commands. They parse and print; the stages do the work, and are imported when it starts."""
