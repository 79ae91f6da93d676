"""Linear attention without decay."""

from subquad.ops.linear.api import NormalizedState, linear_attention

__all__ = ["NormalizedState", "linear_attention"]
