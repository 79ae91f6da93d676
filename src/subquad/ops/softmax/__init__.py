"""Softmax attention: the baseline of everything."""

from subquad.ops.softmax.api import SoftmaxState, softmax_attention

__all__ = ["SoftmaxState", "softmax_attention"]
