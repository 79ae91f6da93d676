"""Attention with one query, as a mean over every prefix."""

from subquad.ops.prefix_attention.api import PrefixState, combine_prefix, prefix_attention

__all__ = ["PrefixState", "combine_prefix", "prefix_attention"]
