"""How good q is: bounds, gaps, intervals."""
