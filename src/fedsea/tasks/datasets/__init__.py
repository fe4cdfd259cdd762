"""The tasks, each in the file of its name."""
