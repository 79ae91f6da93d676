"""Run in a process of its own with flash-linear-attention on the path: its own results on random operands.

``python -m tests.peers.fla_functions FILE`` writes ``CASE/operands/NAME``, ``CASE/output`` and ``CASE/gradients/NAME``
for every case below; the gradient is that of ``(output * CASE/weight).sum()``. Its naive functions run as they are. Its
layers run with their recurrences replaced by those functions, and fused norms and convolutions by definitions in torch.
"""

import sys
from functools import partialmethod

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests.peers.fla_checkpoint import Norm, gla, normalized

BATCH, TIME, HEADS, WIDTH, COLUMNS = 2, 33, 3, 8, 5


def drawn(*names, batch=BATCH, time=TIME, heads=HEADS, width=WIDTH, columns=COLUMNS):
    """Operands by name: what a name means has one shape and range everywhere."""
    rows = (batch, time, heads)
    makers = {
        "q": lambda: torch.randn(*rows, width),
        "k": lambda: torch.randn(*rows, width),
        "unit_k": lambda: F.normalize(torch.randn(*rows, width), dim=-1),
        "positive_q": lambda: torch.rand(*rows, width),
        "positive_k": lambda: torch.rand(*rows, width),
        "v": lambda: torch.randn(*rows, columns),
        "slots": lambda: 2 * torch.randn(*rows, 6),
        "log_decay": lambda: -torch.rand(*rows),
        "log_decay_of_channels": lambda: -torch.rand(*rows, width),
        "beta": lambda: torch.rand(*rows),
        "state": lambda: torch.randn(batch, heads, width, columns),
    }
    return {name: makers[name]() for name in names}


def by_heads(*tensors):
    return (x.transpose(1, 2) for x in tensors)


def based(q, k, v):
    from fla.ops.based.naive import naive_parallel_based

    return naive_parallel_based(*by_heads(q, k, v)).transpose(1, 2)


def linear_attention(positive_q, positive_k, v):
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    return naive_recurrent_linear_attn(positive_q, positive_k, v, normalize=True)[0]


def linear_attention_from_a_state(q, k, v, state):
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    return naive_recurrent_linear_attn(q, k, v, scale=1.0, initial_state=state)[0]


def bounded_memory(q, k, v, slots):
    """Attention over slots (ABC), each the mean of keys and of values under a softmax over the tokens so far."""
    from fla.ops.abc.naive import naive_cumsum_abc

    return naive_cumsum_abc(*by_heads(q, k, v, slots))[0].transpose(1, 2)


def gated_linear_attention(q, k, v, log_decay_of_channels, state):
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, log_decay_of_channels, initial_state=state)[0]


def simple_gated_linear_attention(q, k, v, log_decay, state):
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    return naive_recurrent_simple_gla(q, k, v, log_decay, initial_state=state)[0]


def retention(q, k, v):
    from fla.ops.retention.naive import naive_retention

    return naive_retention(*by_heads(q, k, v)).transpose(1, 2)


def delta_rule(q, unit_k, v, beta, state):
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    return delta_rule_recurrence(*by_heads(q, unit_k, v, beta), initial_state=state)[0].transpose(1, 2)


def gated_delta_rule(q, unit_k, v, beta, log_decay, state):
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    return naive_recurrent_gated_delta_rule(q, unit_k, v, beta, log_decay, initial_state=state)[0]


def kimi_delta_attention(q, unit_k, v, log_decay_of_channels, beta, state):
    from fla.ops.kda.naive import naive_recurrent_kda

    return naive_recurrent_kda(q, unit_k, v, log_decay_of_channels, beta, initial_state=state)[0]


def negative_eigenvalues(q, unit_k, v, beta, log_decay):
    """Two updates per token with beta in (0, 2), as products of Householder matrices."""
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    keys = unit_k.repeat_interleave(2, 1).roll(1, 1)
    values, strengths = v.repeat_interleave(2, 1), (2 * beta).repeat_interleave(2, 1)
    return naive_recurrent_gated_delta_product(
        q, keys, values, log_decay, strengths, scale=1.0, num_householder=2, output_final_state=True
    )[0]


FUNCTIONS = {
    based: ("q", "k", "v"),
    linear_attention: ("positive_q", "positive_k", "v"),
    linear_attention_from_a_state: ("q", "k", "v", "state"),
    bounded_memory: ("q", "k", "v", "slots"),
    gated_linear_attention: ("q", "k", "v", "log_decay_of_channels", "state"),
    simple_gated_linear_attention: ("q", "k", "v", "log_decay", "state"),
    retention: ("q", "k", "v"),
    delta_rule: ("q", "unit_k", "v", "beta", "state"),
    gated_delta_rule: ("q", "unit_k", "v", "beta", "log_decay", "state"),
    kimi_delta_attention: ("q", "unit_k", "v", "log_decay_of_channels", "beta", "state"),
    negative_eigenvalues: ("q", "unit_k", "v", "beta", "log_decay"),
}


class PackedConvolution(nn.Conv1d):
    """Depthwise causal convolution and its activation, sequence by sequence."""

    def __init__(self, hidden_size, kernel_size, bias=False, activation=None, **_):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x, cu_seqlens=None, **_):
        sizes = [x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        pieces = []
        for piece in x.split(sizes, 1):
            padded = F.pad(piece.mT, (self.kernel_size[0] - 1, 0))
            pieces.append(F.conv1d(padded, self.weight, self.bias, groups=self.groups).mT)
        y = torch.cat(pieces, 1)
        return (F.silu(y) if self.activation else y), None


def packed_gated_delta_rule(q, k, v, g, beta, cu_seqlens=None, **_):
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    sizes = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    pieces = zip(*(x.split(sizes, 1) for x in (normalized(q), normalized(k), v, beta, g)))
    return torch.cat([naive_recurrent_gated_delta_rule(*piece)[0] for piece in pieces], 1), None


def additive(q, k, v, **_):
    """The gates by torch's running log-sum-exp, in naive GSA's words; the recurrence is naive GLA."""
    z = k.logcumsumexp(1)
    return gla(q, torch.exp(k - z), v, torch.cat((z[:, :1], z[:, :-1]), 1) - z)[0], (None, None)


def gated_norm_linear(x, gate, weight, bias, linear_weight, linear_bias, eps=1e-6):
    """Under the name and the default of the fused function: the layer's own ``norm_eps`` never reaches it."""
    return F.linear(F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(gate), linear_weight, linear_bias)


def based_layer(causal):
    from fla.layers.based import BasedLinearAttention

    layer = BasedLinearAttention(32, feature_dim=4, num_heads=4, num_key_value_heads=4, causal=causal)
    layer.forward = layer.forward_reference
    return layer


def lightnet_layer():
    from fla.layers import lightnet as room

    room.FusedRMSNormGated, room.rms_norm_swish_gate_linear = Norm, gated_norm_linear
    room.chunk_lightnet = room.fused_recurrent_lightnet = additive
    return room.LightNetAttention(hidden_size=32, num_heads=4, expand_ratio=6, gate_low_rank_dim=5)


def memories_layer(shared, single):
    """With a stable sort: without it tokens of a memory leave the order of time, and outputs depend on later tokens."""
    from fla.layers import mom as room

    torch.Tensor.argsort = partialmethod(torch.argsort, stable=True)
    room.ShortConvolution, room.FusedRMSNormGated, room.RMSNorm = PackedConvolution, Norm, Norm
    room.chunk_gated_delta_rule = room.fused_recurrent_gated_delta_rule = packed_gated_delta_rule
    return room.MomAttention(32, head_dim=8, expand_v=2, num_memories=4, shared_mem=shared, single_kv_proj=single)


LAYERS = {
    "based_layer": lambda: based_layer(True),
    "based_layer_over_all_tokens": lambda: based_layer(False),
    "lightnet_layer": lightnet_layer,
    "memories_layer": lambda: memories_layer(True, False),
    "memories_layer_alone": lambda: memories_layer(False, False),
    "memories_layer_single": lambda: memories_layer(True, True),
}


def hedgehog_features():
    from fla.modules.feature_map import HedgehogFeatureMap

    return HedgehogFeatureMap(WIDTH).double()


def t2r_features():
    from fla.modules.feature_map import T2RFeatureMap

    return T2RFeatureMap(WIDTH, bias=True).double()


def dpfp_features():
    from fla.modules.feature_map import DPFPFeatureMap

    return DPFPFeatureMap(WIDTH, nu=1)


MAPS = {f.__name__: f for f in (hedgehog_features, t2r_features, dpfp_features)}


def record(name, operands, compute, found):
    operands = {key: x.detach().clone().requires_grad_() for key, x in operands.items()}
    output = compute(**operands)
    output = output[0] if isinstance(output, tuple) else output
    weight = torch.randn(output.shape, dtype=output.dtype)
    (output * weight).sum().backward()
    found[f"{name}/output"], found[f"{name}/weight"] = output, weight
    for key, x in operands.items():
        found[f"{name}/operands/{key}"] = x
        found[f"{name}/gradients/{key}"] = x.grad


def main(path):
    found = {}
    for seed, (function, names) in enumerate(FUNCTIONS.items()):
        torch.manual_seed(seed)
        record(function.__name__, drawn(*names), function, found)
    for seed, (name, build) in enumerate((LAYERS | MAPS).items()):
        torch.manual_seed(100 + seed)
        module = build().eval()
        kind = torch.float64 if name in MAPS else torch.float32
        x = torch.randn(BATCH, TIME, HEADS, WIDTH, dtype=kind) if name in MAPS else torch.randn(BATCH, TIME, 32)
        weights = {key: p + 0.1 * torch.randn_like(p) for key, p in module.named_parameters()}

        def compute(x, module=module, **weights):
            return torch.func.functional_call(module, weights, (x,))

        record(name, {"x": x, **weights}, compute, found)
    save_file({key: x.detach().contiguous().clone() for key, x in found.items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
