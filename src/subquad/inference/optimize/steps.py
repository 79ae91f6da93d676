"""One token through transformers' recurrent layers: their own projections and norms, our kernels for all between.

Each function computes what the ``forward`` of its layers computes for one token after a cache, and changes the cache's
tensors in place as that does. It returns None, having changed nothing, where a kernel does not serve: the layer then
goes its ordinary way. Which ``forward`` a function stands for is known by the digest of its source
(:data:`.families.STEPS`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.inference.optimize import step_kernels
from subquad.inference.optimize.functions import SILU


def _states(
    layer: Any, cache: Any, x: Tensor, mask: Tensor | None, packing: dict[str, Any], *weights: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The layer's two states, contiguous, if one token may go through kernels."""
    if mask is not None or packing.get("seq_idx") is not None or packing.get("cu_seq_lens_q") is not None:
        return None
    if cache.is_recording_past(layer.layer_idx) or layer.activation not in SILU or not _plain(layer.conv1d, nn.Conv1d):
        return None
    convolved = cache.get_conv_state(layer.layer_idx, state_idx=0)
    recurrent = cache.get_recurrent_state(layer.layer_idx, state_idx=0)
    if convolved is None or recurrent is None:
        return None
    conv1d = layer.conv1d
    if not step_kernels.serves(x, conv1d.weight, conv1d.bias, convolved, recurrent, *weights):
        return None
    if not (convolved.is_contiguous() and recurrent.is_contiguous()):
        return None
    return convolved, recurrent


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """A module whose weights may be read past its ``forward``: of exactly this class, without an accelerate hook."""
    return type(module) is kind and "_hf_hook" not in module.__dict__


def mamba(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Mamba, FalconMamba and Jamba; the last two normalise step, B and C."""
    projection = layer.dt_proj
    if not _plain(projection, nn.Linear):
        return None
    states = _states(layer, cache, x, mask, packing, projection.weight, layer.D, layer.A_log)
    if states is None:
        return None
    convolved, recurrent = states
    channels, width = layer.A_log.shape
    inner = layer.in_proj(x)[:, 0]
    u = step_kernels.convolve_rows(inner[:, :channels], convolved, layer.conv1d.weight, layer.conv1d.bias)
    maps = layer.x_proj(u.to(x.dtype))
    low, write, read = maps.split([maps.shape[-1] - 2 * width, width, width], dim=-1)
    if hasattr(layer, "dt_layernorm"):
        low, write, read = layer.dt_layernorm(low), layer.b_layernorm(write), layer.c_layernorm(read)
    logits = F.linear(low, projection.weight)
    y = step_kernels.selective_scan(
        u, logits, layer.A_log, write, read, layer.D, projection.bias, inner[:, channels:], recurrent, logarithms=True
    )
    output: Tensor = layer.out_proj(y[:, None].to(x.dtype))
    return output


def zamba(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Zamba's Mamba of several heads, each with maps of its own: one scan over all their channels."""
    weights = (layer.x_proj_weight, layer.dt_proj_weight, layer.dt_proj_bias, layer.D, layer.A_log)
    states = _states(layer, cache, x, mask, packing, *weights)
    if states is None:
        return None
    convolved, recurrent = states
    heads, channels, width = layer.A_log.shape
    rows = x.shape[0]
    inner = layer.in_proj(x)[:, 0].view(rows, -1, 2)
    u = step_kernels.convolve_rows(inner[..., 0].contiguous(), convolved, layer.conv1d.weight, layer.conv1d.bias)
    gate = inner[..., 1].reshape(rows, heads, channels)
    by_head = u.to(x.dtype).view(rows, heads, channels)
    maps = torch.einsum("hmc,bhc->hbm", layer.x_proj_weight, by_head)
    low, write, read = maps.split([maps.shape[-1] - 2 * width, width, width], dim=-1)
    logits = torch.bmm(low, layer.dt_proj_weight.mT)
    outputs = [
        step_kernels.selective_scan(
            by_head[:, head],
            logits[head],
            layer.A_log[head],
            write[head],
            read[head],
            layer.D[head],
            layer.dt_proj_bias[head],
            gate[:, head],
            recurrent[:, head],
            logarithms=True,
        )
        for head in range(heads)
    ]
    output: Tensor = layer.out_proj(torch.cat(outputs, dim=-1)[:, None].to(x.dtype))
    return output


def mamba2(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Mamba2, Bamba, GraniteMoeHybrid, NemotronH, Zamba2: a gated norm after the scan."""
    states = _states(layer, cache, x, mask, packing, layer.dt_bias, layer.D, layer.A_log)
    if states is None:
        return None
    projected = layer.in_proj(x)
    y = _ssd(layer, projected, *states)
    output: Tensor = layer.out_proj(layer.norm(y, projected[..., : layer.intermediate_size]))
    return output


def falcon_h1(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """FalconH1: as Mamba-2 with multipliers, and a norm or a plain gate."""
    states = _states(layer, cache, x, mask, packing, layer.dt_bias, layer.D, layer.A_log)
    if states is None:
        return None
    projected = layer.in_proj(x * layer.ssm_in_multiplier) * layer.mup_vector
    y = _ssd(layer, projected, *states)
    gate = projected[..., : layer.intermediate_size]
    output: Tensor = layer.out_proj(layer.norm(y, gate) if layer.mamba_rms_norm else y * F.silu(gate))
    return output


def _ssd(layer: Any, projected: Tensor, convolved: Tensor, recurrent: Tensor) -> Tensor:
    """``(B, 1, H P)`` from what is projected: gate, the convolution's input, and steps."""
    rows, heads, groups = projected.shape[0], layer.num_heads, layer.n_groups
    inner = layer.intermediate_size
    maps = groups * layer.ssm_state_size
    flat = projected[:, 0]
    mixed = step_kernels.convolve_rows(
        flat[:, inner : inner + layer.conv_dim], convolved, layer.conv1d.weight, layer.conv1d.bias
    )
    y = step_kernels.ssd(
        mixed[:, :inner],
        flat[:, inner + layer.conv_dim :],
        layer.A_log,
        mixed[:, inner : inner + maps].view(rows, groups, -1),
        mixed[:, inner + maps :].view(rows, groups, -1),
        layer.D,
        layer.dt_bias,
        recurrent,
        logarithms=True,
    )
    return y.view(rows, 1, heads * layer.head_dim).to(projected.dtype)


def qwen3_next(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Qwen3Next's gated delta rule, whose projections are ordered by key heads."""
    states = _states(layer, cache, x, mask, packing, layer.dt_bias, layer.A_log)
    if states is None:
        return None
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    mixed = torch.cat([part.flatten(1) for part in (query, key, value)], dim=-1)
    y = _gated_delta(layer, mixed, a[:, 0], b[:, 0], 1.0, *states)
    rows = x.shape[0]
    output: Tensor = layer.out_proj(layer.norm(y.flatten(0, 1), z.reshape(-1, z.shape[-1])).view(rows, 1, -1))
    return output


def qwen3_5(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """The gated delta rule of Qwen3.5, its MoE, LaraMini and Qwen4Exp."""
    states = _states(layer, cache, x, mask, packing, layer.dt_bias, layer.A_log)
    if states is None:
        return None
    mixed, z, b, a = layer.in_proj_qkv(x), layer.in_proj_z(x), layer.in_proj_b(x), layer.in_proj_a(x)
    y = _gated_delta(layer, mixed[:, 0], a[:, 0], b[:, 0], 1.0, *states)
    normed = layer.norm(y.flatten(0, 1), z.view(-1, layer.head_v_dim))
    output: Tensor = layer.out_proj(normed.view(x.shape[0], 1, -1))
    return output


def olmo_hybrid(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """OlmoHybrid's gated delta rule, with eigenvalues down to -1."""
    states = _states(layer, cache, x, mask, packing, layer.dt_bias, layer.A_log)
    if states is None:
        return None
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)
    largest = 2.0 if layer.allow_neg_eigval else 1.0
    y = _gated_delta(layer, mixed[:, 0], layer.a_proj(x)[:, 0], layer.b_proj(x)[:, 0], largest, *states)
    normed = layer.o_norm(y.flatten(0, 1), layer.g_proj(x).view(-1, layer.head_v_dim))
    output: Tensor = layer.o_proj(normed.view(x.shape[0], 1, -1))
    return output


def _gated_delta(
    layer: Any, mixed: Tensor, a: Tensor, b: Tensor, largest: float, convolved: Tensor, recurrent: Tensor
) -> Tensor:
    """``(B, H, V)`` from q, k and v side by side ``(B, C)`` and the logits of decay and strength ``(B, H)``."""
    mixed = step_kernels.convolve_rows(mixed, convolved, layer.conv1d.weight, layer.conv1d.bias)
    log_decay, beta = step_kernels.delta_gates(a, b, layer.A_log, layer.dt_bias, largest)
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    y = step_kernels.delta(query, key, value, log_decay, beta, recurrent, normalize=True)
    return y.to(a.dtype)


def kimi(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Kimi delta attention of KimiLinear and GLM-5 Next: an output gate of low rank."""
    return _kimi(layer, x, cache, mask, packing, lambda: layer.g_b_proj(layer.g_a_proj(x)))


def bailing(layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Kimi delta attention of BailingHybrid: an output gate of full rank."""
    return _kimi(layer, x, cache, mask, packing, lambda: layer.g_proj(x))


def _kimi(
    layer: Any, x: Tensor, cache: Any, mask: Tensor | None, packing: dict[str, Any], gate: Callable[[], Tensor]
) -> Tensor | None:
    states = _states(layer, cache, x, mask, packing)
    if states is None:
        return None
    convolved, recurrent = states
    heads, width = layer.num_heads, layer.head_dim
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)[:, 0]
    mixed = step_kernels.convolve_rows(mixed, convolved, layer.conv1d.weight, layer.conv1d.bias)
    log_decay = layer.forget_gate(x).reshape(-1, heads, width)
    beta = torch.sigmoid(layer.b_proj(x))[:, 0]
    query, key, value = mixed.split(heads * width, dim=-1)
    y = step_kernels.delta(query, key, value, log_decay, beta, recurrent, normalize=True).to(x.dtype)
    shape = (-1, 1, heads, width)
    output: Tensor = layer.o_proj(layer.o_norm(y.view(shape), gate().view(shape)).flatten(2))
    return output
