"""Token-mixing operations: one public function per mathematical meaning, the backend a separate choice.

Every op returns ``(output, state)``; the state is None unless asked for.
"""

from subquad.ops.convolution import short_convolution
from subquad.ops.delta import delta_attention_matrix, delta_product, delta_rule, gated_delta_rule, kda
from subquad.ops.gla import gla, simple_gla
from subquad.ops.lightning import lightning_attention, lightning_slopes, retention_slopes, window_slopes
from subquad.ops.linear import NormalizedState, linear_attention
from subquad.ops.softmax import SoftmaxState, softmax_attention

__all__ = [
    "softmax_attention",
    "linear_attention",
    "lightning_attention",
    "simple_gla",
    "gla",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "delta_product",
    "short_convolution",
    "delta_attention_matrix",
    "lightning_slopes",
    "retention_slopes",
    "window_slopes",
    "NormalizedState",
    "SoftmaxState",
]
