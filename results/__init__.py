"""Studies of the project: their runs, tables and pictures."""
