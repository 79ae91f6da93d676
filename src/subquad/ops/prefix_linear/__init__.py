"""Linear attention that reads a prefix in both directions and the rest causally."""

from subquad.ops.prefix_linear.api import prefix_linear_attention

__all__ = ["prefix_linear_attention"]
