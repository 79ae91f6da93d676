"""The diagonal scan on a GPU by Triton: one program per sequence and block of channels, walking over the tokens.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, everything runs on CPU tensors, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.scan.gpu_tiles import sequence_places

BLOCK = 64


def forward(decay: Tensor, x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """All states ``(B, T, D)`` in x's dtype and the last of each sequence; as :func:`.diagonal_cpu.forward`."""
    return _states(decay, x, initial_state, cu_seqlens, x.dtype)


def _states(
    decay: Tensor, x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, time, channels = x.shape
    starts, _ = sequence_places(batch, time, cu_seqlens, x.device)
    h, last = x.new_empty(x.shape, dtype=dtype), initial_state.new_empty(initial_state.shape)
    with torch.cuda.device_of(x):
        forward_kernel[(len(starts) - 1, triton.cdiv(channels, BLOCK))](
            decay.contiguous(),
            x.contiguous(),
            initial_state.contiguous(),
            starts,
            h,
            last,
            channels,
            BLOCK=BLOCK,
            num_warps=2,
        )
    return h, last


def backward(
    grad_h: Tensor, grad_last: Tensor, decay: Tensor, x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of decay, x and the initial state. The states are computed once more rather than kept."""
    batch, time, channels = x.shape
    starts, _ = sequence_places(batch, time, cu_seqlens, x.device)
    h, _ = _states(decay, x, initial_state, cu_seqlens, torch.float32)
    grad_decay, grad_x = decay.new_empty(decay.shape), x.new_empty(x.shape)
    grad_initial = initial_state.new_empty(initial_state.shape)
    with torch.cuda.device_of(x):
        backward_kernel[(len(starts) - 1, triton.cdiv(channels, BLOCK))](
            grad_h.contiguous(),
            grad_last.contiguous(),
            decay.contiguous(),
            initial_state.contiguous(),
            starts,
            h,
            grad_decay,
            grad_x,
            grad_initial,
            channels,
            BLOCK=BLOCK,
            num_warps=2,
        )
    return grad_decay, grad_x, grad_initial


@triton.jit
def forward_kernel(decay, x, initial_state, starts, h, last, channels, BLOCK: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = d < channels
    state = tl.load(initial_state + sequence * channels + d, real, 0.0)
    for t in range(tl.load(starts + sequence), tl.load(starts + sequence + 1)):
        at = t * channels + d
        state = tl.load(decay + at, real, 0.0).to(tl.float32) * state + tl.load(x + at, real, 0.0).to(tl.float32)
        tl.store(h + at, state, real)
    tl.store(last + sequence * channels + d, state, real)


@triton.jit
def backward_kernel(
    grad_h,
    grad_last,
    decay,
    initial_state,
    starts,
    h,
    grad_decay,
    grad_x,
    grad_initial,
    channels,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = d < channels
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    grad = tl.load(grad_last + sequence * channels + d, real, 0.0)
    first = tl.load(initial_state + sequence * channels + d, real, 0.0)
    for back in range(end - begin):
        t = end - 1 - back
        at = t * channels + d
        inside = at >= (begin + 1) * channels  # not the sequence's first token
        before = tl.where(inside, tl.load(h + at - channels, real & inside, 0.0), first)
        grad += tl.load(grad_h + at, real, 0.0).to(tl.float32)
        tl.store(grad_x + at, grad, real)
        tl.store(grad_decay + at, grad * before, real)
        grad *= tl.load(decay + at, real, 0.0).to(tl.float32)
    tl.store(grad_initial + sequence * channels + d, grad, real)
