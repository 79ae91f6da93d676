"""Linear attention whose forgetting is a running normaliser."""

from subquad.ops.additive.api import AdditiveState, additive_attention, additive_gates, additive_weights

__all__ = ["AdditiveState", "additive_attention", "additive_gates", "additive_weights"]
