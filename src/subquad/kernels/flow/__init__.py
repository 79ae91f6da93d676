"""The gates of causal flow attention: prefix sums along each head, in one pass."""
