"""Attention of blocks of queries over chosen blocks of keys, and the tree search that chooses them."""
