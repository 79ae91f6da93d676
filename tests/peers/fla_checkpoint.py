"""Run in a process of its own with flash-linear-attention on the path: saves a small random model of it and its logits.

``python fla_checkpoint.py KIND FOLDER``. Its GPU kernels cannot run here, so its recurrences are replaced by its own
naive functions, and its fused norms, convolution and rotary embedding by their definitions in torch.
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn


class Norm(nn.Module):
    """RMS norm, with or without a SiLU gate, under the constructor of the fused modules."""

    def __init__(self, hidden_size, elementwise_affine=True, eps=1e-5, **_):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(hidden_size)), None, eps

    def forward(self, x, gate=None):
        normed = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return normed if gate is None else normed * F.silu(gate)


class Convolution(nn.Conv1d):
    def __init__(self, hidden_size, kernel_size, bias=False, activation=None, **_):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)
        self.activation, self.backend = activation, "torch"

    def forward(self, x, **_):
        padded = F.pad(x.mT, (self.kernel_size[0] - 1, 0))
        y = F.conv1d(padded, self.weight, self.bias, groups=self.groups).mT
        return (F.silu(y) if self.activation else y), None


class Rotary(nn.Module):
    def __init__(self, dim, **_):
        super().__init__()
        self.dim = dim

    def forward(self, q, k, **_):
        rate = 1.0 / 10000.0 ** (torch.arange(0, self.dim, 2) / self.dim)
        angle = torch.outer(torch.arange(q.shape[1]), rate)[None, :, None]

        def turn(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

        return turn(q), turn(k)


def normalized(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gla(q, k, v, gk=None, **_):
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, gk)


def delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=False, **_):
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    if use_qk_l2norm_in_kernel:
        q, k = normalized(q), normalized(k)
    o, state = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)))
    return o.transpose(1, 2), state


def gated_delta_rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval=False, **_):
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    shared = v.shape[2] // q.shape[2]
    q, k = (normalized(x).repeat_interleave(shared, 2) for x in (q, k))
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return naive_recurrent_gated_delta_rule(q, k, v, beta, -A_log.exp() * F.softplus(g + dt_bias))


def retention(q, k, v, **_):
    from fla.ops.retention.naive import naive_retention

    return naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None


def build(kind):
    from fla.modules import mlp

    mlp.swiglu = lambda x, y: F.silu(x) * y
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "vocab_size": 50,
        "intermediate_size": 96,
        "fuse_norm": False,
        "fuse_swiglu": False,
        "fuse_cross_entropy": False,
    }
    if kind == "gla":
        from fla.layers import gla as layer
        from fla.models import GLAConfig, GLAForCausalLM

        layer.fused_recurrent_gla, layer.RMSNorm, layer.FusedRMSNormGated = gla, Norm, Norm
        layer.ACT2FN = {"swish": F.silu}
        return GLAForCausalLM(GLAConfig(**small, num_kv_heads=2))
    if kind == "delta_net":
        from fla.layers import delta_net as layer
        from fla.models import DeltaNetConfig, DeltaNetForCausalLM

        layer.fused_recurrent_delta_rule = layer.chunk_delta_rule = delta_rule
        layer.RMSNorm, layer.FusedRMSNormGated, layer.ShortConvolution = Norm, Norm, Convolution
        return DeltaNetForCausalLM(DeltaNetConfig(**small, use_gate=True, allow_neg_eigval=True))
    if kind == "gated_deltanet":
        from fla.layers import gated_deltanet as layer
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        layer.fused_recurrent_gated_delta_rule = layer.chunk_gated_delta_rule = gated_delta_rule
        layer.RMSNorm, layer.FusedRMSNormGated, layer.ShortConvolution = Norm, Norm, Convolution
        layer.GatedDeltaNet._use_fused_qkv_conv = lambda self, **_: False
        return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**small, head_dim=12, num_v_heads=8, expand_v=2))
    from fla.layers import multiscale_retention as layer
    from fla.models import RetNetConfig, RetNetForCausalLM

    layer.fused_recurrent_retention, layer.ACT2FN = retention, {"swish": F.silu}
    layer.RMSNorm, layer.FusedRMSNormGated, layer.RotaryEmbedding = Norm, Norm, Rotary
    return RetNetForCausalLM(RetNetConfig(**small))


@torch.no_grad()
def main(kind, folder):
    torch.manual_seed(0)
    model = build(kind).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(0, 50, (2, 19))
    logits = model(input_ids=ids, use_cache=False).logits
    model.save_pretrained(folder)
    save_file({"ids": ids, "logits": logits.contiguous()}, f"{folder}/expected.out")


if __name__ == "__main__":
    main(*sys.argv[1:])
