"""Linear attention without decay."""

from subquad.ops.linear.api import NormalizedState, linear_attention
from subquad.ops.linear.exponential import ExponentialState, exponential_linear_attention

__all__ = ["ExponentialState", "NormalizedState", "exponential_linear_attention", "linear_attention"]
