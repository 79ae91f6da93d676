"""Position encodings, inside a mixer (rotary, LRPE) or added to a model's embeddings (sinusoidal, learned)."""
