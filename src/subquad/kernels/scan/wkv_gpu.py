"""RWKV-4's weighted average on a GPU by Triton: a program per sequence and block of channels walks over the tokens.

The formulas, and why the gradient of a maximum needs so little, stand in :mod:`.wkv_cpu`. With ``TRITON_INTERPRET=1``
in the environment before triton is imported, everything runs on CPU tensors, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.scan.gpu_tiles import sequence_places

BLOCK = 64


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The average ``(B, T, D)`` in v's dtype and the last state; as :func:`.wkv_cpu.forward`."""
    o, _, last = _states(k, v, log_decay, time_first, numerator, denominator, maximum, cu_seqlens, keep=False)
    return o, last[0].clone(), last[1].clone(), last[2].clone()


def _states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
    cu_seqlens: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The average, the states before every token ``(3, B T, D)`` if wanted, and the last ``(3, N, D)``."""
    batch, time, channels = k.shape
    starts, _ = sequence_places(batch, time, cu_seqlens, k.device)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    before = numerator.new_empty(3, batch * time if keep else 0, channels)
    last = numerator.new_empty(3, *numerator.shape)
    with torch.cuda.device_of(k):
        forward_kernel[(len(starts) - 1, triton.cdiv(channels, BLOCK))](
            k.contiguous(),
            v.contiguous(),
            log_decay.contiguous(),
            time_first.contiguous(),
            torch.stack([numerator, denominator, maximum]),
            starts,
            o,
            before,
            last,
            channels,
            batch * time * channels,
            numerator.numel(),
            KEEP=keep,
            BLOCK=BLOCK,
            num_warps=2,
        )
    return o, before, last


def backward(
    grad_o: Tensor,
    grad_numerator: Tensor,
    grad_denominator: Tensor,
    grad_maximum: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of k, v, log_decay, time_first and of the three of the state. States are computed once more."""
    batch, time, channels = k.shape
    starts, _ = sequence_places(batch, time, cu_seqlens, k.device)
    state = numerator, denominator, maximum
    _, before, last = _states(k, v, log_decay, time_first, *state, cu_seqlens, keep=True)
    grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    small = numerator.new_empty(5, *numerator.shape)  # log_decay, time_first, and the state
    with torch.cuda.device_of(k):
        backward_kernel[(len(starts) - 1, triton.cdiv(channels, BLOCK))](
            grad_o.contiguous(),
            torch.stack([grad_numerator, grad_denominator, grad_maximum]),
            k.contiguous(),
            v.contiguous(),
            log_decay.contiguous(),
            time_first.contiguous(),
            torch.stack(state),
            starts,
            before,
            last,
            grad_k,
            grad_v,
            small,
            channels,
            batch * time * channels,
            numerator.numel(),
            BLOCK=BLOCK,
            num_warps=2,
        )
    of_decay, of_first, *of_state = (x.clone() for x in small)
    return (
        *(grad_k, grad_v, of_decay.sum(0).to(log_decay.dtype), of_first.sum(0).to(time_first.dtype)),
        *of_state,
    )


@triton.jit
def shares(ahead):
    """``e^{a - max(a, b)}, e^{b - max(a, b)}`` from a - b."""
    return tl.exp(tl.minimum(ahead, 0.0)), tl.exp(-tl.maximum(ahead, 0.0))


@triton.jit
def forward_kernel(
    k, v, log_decay, time_first, state, starts, o, before, last, channels, tokens_size, state_size,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = d < channels
    own = sequence * channels + d
    decay, bonus = tl.load(log_decay + d, real, 0.0), tl.load(time_first + d, real, 0.0)
    num, den = tl.load(state + own, real, 0.0), tl.load(state + state_size + own, real, 0.0)
    top = tl.load(state + 2 * state_size + own, real, 0.0)
    for t in range(tl.load(starts + sequence), tl.load(starts + sequence + 1)):
        at = t * channels + d
        key, value = tl.load(k + at, real, 0.0).to(tl.float32), tl.load(v + at, real, 0.0).to(tl.float32)
        if KEEP:
            tl.store(before + at, num, real)
            tl.store(before + tokens_size + at, den, real)
            tl.store(before + 2 * tokens_size + at, top, real)
        past, now = shares(top - bonus - key)
        tl.store(o + at, (past * num + now * value) / (past * den + now), real)
        kept = top + decay
        past, now = shares(kept - key)
        num, den, top = past * num + now * value, past * den + now, tl.where(kept >= key, kept, key)
    tl.store(last + own, num, real)
    tl.store(last + state_size + own, den, real)
    tl.store(last + 2 * state_size + own, top, real)


@triton.jit
def backward_kernel(
    grad_o, grad_last, k, v, log_decay, time_first, state, starts, before, last, grad_k, grad_v, small,
    channels, tokens_size, state_size, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = d < channels
    own = sequence * channels + d
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    decay, bonus = tl.load(log_decay + d, real, 0.0), tl.load(time_first + d, real, 0.0)
    of_num, of_den = tl.load(grad_last + own, real, 0.0), tl.load(grad_last + state_size + own, real, 0.0)
    excess = tl.load(grad_last + 2 * state_size + own, real, 0.0)
    excess -= of_num * tl.load(last + own, real, 0.0) + of_den * tl.load(last + state_size + own, real, 0.0)
    of_decay, of_bonus = tl.zeros_like(excess), tl.zeros_like(excess)
    for back in range(end - begin):
        at = (end - 1 - back) * channels + d
        key, value = tl.load(k + at, real, 0.0).to(tl.float32), tl.load(v + at, real, 0.0).to(tl.float32)
        num, den = tl.load(before + at, real, 0.0), tl.load(before + tokens_size + at, real, 0.0)
        top = tl.load(before + 2 * tokens_size + at, real, 0.0)
        ahead = top + decay - key
        past, now = shares(ahead)
        to_past = tl.where(ahead > 0, 1.0, tl.where(ahead == 0, 0.5, 0.0))
        of_value = now * of_num
        of_key = now * (of_num * value + of_den) + (1 - to_past) * excess
        excess *= to_past
        of_num *= past
        of_den *= past
        of_decay += of_num * num + of_den * den + excess
        past, now = shares(top - bonus - key)
        divisor = past * den + now
        average = (past * num + now * value) / divisor
        share = tl.load(grad_o + at, real, 0.0).to(tl.float32) / divisor
        through_key = share * now * (value - average)
        tl.store(grad_v + at, of_value + share * now, real)
        tl.store(grad_k + at, of_key + through_key, real)
        of_bonus += through_key
        of_num += share * past
        of_den -= share * past * average
    first_num, first_den = tl.load(state + own, real, 0.0), tl.load(state + state_size + own, real, 0.0)
    tl.store(small + own, of_decay, real)
    tl.store(small + state_size + own, of_bonus, real)
    tl.store(small + 2 * state_size + own, of_num, real)
    tl.store(small + 3 * state_size + own, of_den, real)
    tl.store(small + 4 * state_size + own, excess + of_num * first_num + of_den * first_den, real)
