"""BUG: locate the elements, taps, channels and borders that are wrong."""
