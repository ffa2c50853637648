"""Where the values of cells are kept: one kind a file, and their registry."""
