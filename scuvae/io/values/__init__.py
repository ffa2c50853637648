"""The values of a matrix: looked at before any work."""
