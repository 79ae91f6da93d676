"""When one token may go through the in-place kernels of :mod:`subquad.kernels.steps.in_place`, and the calls.

Only where nothing could tell: on a CPU, no gradient, no tracing, no interception of torch's calls. Elsewhere
the functions of this room take the way through the operations.
"""

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.steps.plan import intercepted

PLAIN = (Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def serves(first: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors on a CPU, float32 or narrower, whose values alone matter now."""
    if torch.compiler.is_compiling() or not backends.INSTALLED["numba"]:
        return False
    if os.environ.get("SUBQUAD_BACKEND", "auto") not in ("auto", "cpu") or intercepted(first):
        return False
    differentiable = torch.is_grad_enabled()
    return all(
        x is None or (type(x) in PLAIN and x.dtype in FLOATS and x.is_cpu and not (differentiable and x.requires_grad))
        for x in (first, *others)
    )


@cache
def _kernels() -> Any:
    return importlib.import_module("subquad.kernels.steps.in_place")


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """``x (B, ...)``, each row contiguous, and the distance of the rows; a copy where rows are scattered."""
    flat = wide(x).flatten(1)
    if flat.shape[1] > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    stride = flat.stride(0) if flat.shape[0] > 1 else flat.shape[1]
    if stride < flat.shape[1]:  # a row that is expanded over the batch
        flat = flat.contiguous()
        stride = flat.shape[1]
    return flat, stride


def wide(x: Tensor) -> Tensor:
    """float32, without the graph: of the weights of a bfloat16 model a copy, as small as they are."""
    return x if x.dtype is torch.float32 else x.detach().float()


def whole(x: Tensor) -> Tensor:
    """float32 and contiguous."""
    return wide(x).contiguous()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def convolve_rows(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = True) -> Tensor:
    """``x (B, C)`` convolved with ``weight (C, ..., K)`` after ``state (B, C, >= K - 1)``, which takes it in."""
    rows, channels, kept = state.shape
    flat, stride = rows_of(x)
    weight, bias = whole(weight), None if bias is None else whole(bias)
    out = torch.empty(rows, channels)
    home = whole(state)
    _kernels().convolve(
        address(flat), stride, address(home), address(weight), address(bias), address(out),
        rows, channels, weight.shape[-1], kept, silu,
    )  # fmt: skip
    if home is not state:
        state.copy_(home)
    return out


def delta_gates(a: Tensor, b: Tensor, rates: Tensor, bias: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """``-exp(rates) softplus(a + bias)`` and ``largest sigmoid(b)``, all ``(B, H)`` or ``(H,)``."""
    rows, heads = a.shape
    (a, a_stride), (b, b_stride) = rows_of(a), rows_of(b)
    rates, bias = whole(rates), whole(bias)
    log_decay, beta = torch.empty(2, rows, heads).unbind()
    _kernels().delta_gates(
        address(a), a_stride, address(b), b_stride, address(rates), address(bias), largest,
        address(log_decay), address(beta), rows, heads,
    )  # fmt: skip
    return log_decay, beta


def selective_scan(
    u: Tensor,
    logits: Tensor,
    rates: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    *,
    logarithms: bool = False,
) -> Tensor:
    """``u, logits, gate (B, D)``, ``write, read (B, N)``, ``rates (D, N)``: the output; ``state (B, D, N)`` moves on.

    ``rates`` are A, or the logarithms of -A.
    """
    rows, channels, states = state.shape
    (u, u_stride), (logits, logit_stride) = rows_of(u), rows_of(logits)
    (write, write_stride), (read, read_stride) = rows_of(write), rows_of(read)
    if write_stride != read_stride:
        write, read = whole(write), whole(read)
        write_stride = states
    gated, gate_stride = (None, 0) if gate is None else rows_of(gate)
    rates, skip, bias = whole(rates), whole(skip), None if bias is None else whole(bias)
    out = torch.empty(rows, channels)
    home = whole(state)
    _kernels().selective_scan(
        address(u), u_stride, address(logits), logit_stride, address(rates), logarithms,
        address(write), address(read), write_stride, address(skip), address(bias), address(gated), gate_stride,
        address(home), address(out), rows, channels, states,
    )  # fmt: skip
    if home is not state:
        state.copy_(home)
    return out


def ssd(
    x: Tensor,
    logits: Tensor,
    rates: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    logarithms: bool = False,
) -> Tensor:
    """``x (B, H, P)``, ``logits (B, H)``, ``write, read (B, G, N)``: the output; ``state (B, H, P, N)`` moves on."""
    rows, heads, width, states = state.shape
    groups = write.shape[1]
    (x, x_stride), (logits, logit_stride) = rows_of(x), rows_of(logits)
    (write, write_stride), (read, read_stride) = rows_of(write), rows_of(read)
    rates, skip, bias = whole(rates), whole(skip), None if bias is None else whole(bias)
    out = torch.empty(rows, heads, width)
    home = whole(state)
    _kernels().ssd(
        address(x), x_stride, address(logits), logit_stride, address(rates), logarithms,
        address(write), write_stride, address(read), read_stride, address(skip), address(bias),
        address(home), address(out), rows, heads, width, groups, states,
    )  # fmt: skip
    if home is not state:
        state.copy_(home)
    return out


def delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *, normalize: bool
) -> Tensor:
    """``q, k (B, Hk, K)``, ``v (B, H, V)``, decay also ``(B, H, K)``: the output; ``state (B, H, K, V)`` moves on."""
    rows, heads, width, columns = state.shape
    (q, q_stride), (k, k_stride), (v, v_stride) = rows_of(q), rows_of(k), rows_of(v)
    log_decay, beta = whole(log_decay), whole(beta)
    out = torch.empty(rows, heads, columns)
    home = whole(state)
    key_heads = q.shape[1] // width
    _kernels().delta(
        address(q), q_stride, address(k), k_stride, address(v), v_stride,
        address(log_decay), log_decay.ndim == 3, address(beta), address(home), address(out),
        rows, key_heads, heads, width, columns, normalize,
    )  # fmt: skip
    if home is not state:
        state.copy_(home)
    return out
