"""What each command does with the flags that it was given."""
