"""Compiled code alone, and the one place that decides whether to use it."""
