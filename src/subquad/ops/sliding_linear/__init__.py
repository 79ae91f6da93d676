"""Softmax over a window and linear attention over all before it, under one normaliser."""

from subquad.ops.sliding_linear.api import SlidingLinearState, sliding_linear_attention, terraced_linear_attention

__all__ = ["SlidingLinearState", "sliding_linear_attention", "terraced_linear_attention"]
