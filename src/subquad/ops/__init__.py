"""Token-mixing operations: one public function per mathematical meaning, the backend a separate choice.

Every op returns ``(output, state)``; the state is None unless asked for.
"""

from subquad.ops.additive import AdditiveState, additive_attention, additive_gates, additive_weights
from subquad.ops.block_sparse import block_sparse_attention, hip_attention, hip_mask
from subquad.ops.convolution import dynamic_depthwise_conv, short_convolution
from subquad.ops.delta import delta_attention_matrix, delta_product, delta_rule, gated_delta_rule, kda
from subquad.ops.diagonal_scan import diagonal_scan
from subquad.ops.flow import FlowState, flow_attention
from subquad.ops.gla import gla, simple_gla
from subquad.ops.injective import (
    InjectiveState,
    combine_injective,
    injective_linear_attention,
    injective_read,
    injective_state,
)
from subquad.ops.lightning import lightning_attention, lightning_slopes, retention_slopes, window_slopes
from subquad.ops.linear import ExponentialState, NormalizedState, exponential_linear_attention, linear_attention
from subquad.ops.mlstm import MLSTMState, mlstm
from subquad.ops.neural_memory import NeuralMemoryState, neural_memory, neural_memory_read
from subquad.ops.prefix_attention import PrefixState, combine_prefix, prefix_attention
from subquad.ops.prefix_linear import prefix_linear_attention
from subquad.ops.selective_scan import selective_scan
from subquad.ops.sliding_linear import SlidingLinearState, sliding_linear_attention, terraced_linear_attention
from subquad.ops.softmax import SoftmaxState, softmax_attention
from subquad.ops.sparse_feedforward import sparse_down_projection, sparse_gated_feedforward
from subquad.ops.ssd import ssd
from subquad.ops.taylor import taylor_features, taylor_linear_attention
from subquad.ops.wkv import WKVState, wkv

__all__ = [
    "softmax_attention",
    "block_sparse_attention",
    "hip_attention",
    "linear_attention",
    "exponential_linear_attention",
    "taylor_linear_attention",
    "prefix_linear_attention",
    "sliding_linear_attention",
    "terraced_linear_attention",
    "flow_attention",
    "injective_linear_attention",
    "lightning_attention",
    "simple_gla",
    "gla",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "delta_product",
    "additive_attention",
    "prefix_attention",
    "selective_scan",
    "ssd",
    "diagonal_scan",
    "wkv",
    "mlstm",
    "short_convolution",
    "dynamic_depthwise_conv",
    "neural_memory",
    "neural_memory_read",
    "sparse_gated_feedforward",
    "sparse_down_projection",
    "delta_attention_matrix",
    "hip_mask",
    "taylor_features",
    "lightning_slopes",
    "retention_slopes",
    "window_slopes",
    "additive_gates",
    "additive_weights",
    "combine_prefix",
    "combine_injective",
    "injective_read",
    "injective_state",
    "NeuralMemoryState",
    "NormalizedState",
    "AdditiveState",
    "PrefixState",
    "ExponentialState",
    "FlowState",
    "WKVState",
    "MLSTMState",
    "InjectiveState",
    "SlidingLinearState",
    "SoftmaxState",
]
