"""Linear attention whose features are the terms of a Taylor series, never held for more than a few tokens at once."""
