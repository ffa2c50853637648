"""Matrices that are not in memory, read by runs of rows: one kind a file, and their registry."""
