"""The Gaussian q, fixed draws of it, and its precision."""
