"""Whether a fit that is read is the one that was written."""
