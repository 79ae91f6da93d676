"""The door to the short causal convolution."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.kernels.scan.dispatch import convolution_cpu
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops.convolution.reference import short_convolution_reference

ACTIVATIONS = (None, "silu")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over the last W tokens (Gu & Dao 2023, section 3.4), then an activation.

    Args:
        x: ``(B, T, D)``, one of float64, float32, bfloat16, float16.
        weight: ``(D, W)``; the last column weighs the current token.
        bias: ``(D,)``.
        activation: None or ``"silu"``.
        lengths: ``(B,)`` integers, how many first tokens of a row are real; the state is that after the last real one.
        initial_state: ``(B, W - 1, D)``, the tokens before the first; zeros if not given. Packed: ``(N, W - 1, D)``.
        return_state: whether to return the last W - 1 tokens.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. ``cpu`` computes
            in numba; ``chunked`` and ``gpu`` are plain torch.

    Returns:
        The output ``(B, T, D)``, and the state in x's dtype or None.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit; the message says what is needed.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
        >>> short_convolution(x, torch.tensor([[10.0, 1.0]]))[0].flatten().tolist()
        [1.0, 12.0, 23.0]
    """
    contract.check_tensor("x", x, 3, "(batch, time, channels)")
    contract.check_not_empty("x", x)
    contract.check_tensor("weight", weight, 2, "(channels, width)")
    contract.check_not_empty("weight", weight)
    contract.check_argument("weight", weight, x, (x.shape[2], weight.shape[1]), "(channels, width)")
    if bias is not None:
        contract.check_argument("bias", bias, x, (x.shape[2],), "(channels,)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu'; got {activation!r}")
    contract.check_cu_seqlens(cu_seqlens, x)
    dynamics.note_outside(f"short convolution over {weight.shape[1]} tokens")
    batch, time, channels = x.shape
    states = contract.number_of_states(x, cu_seqlens)
    if lengths is not None and (cu_seqlens is not None or tuple(lengths.shape) != (batch,)):
        raise ValueError(f"lengths must be (batch,) = {(batch,)} integers, and not given with cu_seqlens")
    before = weight.shape[1] - 1
    given = initial_state
    if initial_state is None:
        initial_state = x.new_zeros(states, before, channels)
    shape = (states, before, channels)
    contract.check_argument("initial_state", initial_state, x, shape, "(batch or sequences, width - 1, channels)")
    initial_state = initial_state.to(x.dtype)

    chosen = backends.resolve(backend, x.device, x.dtype)
    if chosen == "cpu" and cu_seqlens is None:
        (output,) = convolution_cpu(x, weight, bias, given, activation == "silu")
        if not return_state:
            return output, None
        recent = x if lengths is not None or time < before else x[:, time - before :]
        return output, _last_tokens(torch.cat([initial_state, recent], dim=1), before, lengths)
    if chosen == "reference":
        output, state = _reference(x, weight, bias, initial_state, lengths, cu_seqlens)
    elif cu_seqlens is None:
        padded = torch.cat([initial_state, x], dim=1)
        output = _taps([padded[:, tap : tap + time] for tap in range(before + 1)], weight, bias)
        state = _last_tokens(padded, before, lengths)
    else:

        def convolve(row: Tensor) -> Tensor:
            if chosen == "cpu":
                return convolution_cpu(row, weight, bias, None, activation == "silu")[0]
            padded = F.pad(row, (0, 0, before, 0))
            output = _taps([padded[:, tap : tap + row.shape[1]] for tap in range(before + 1)], weight, bias)
            return F.silu(output) if activation == "silu" else output

        output, state = _packed(x, initial_state, cu_seqlens, convolve)
        return output, state if return_state else None
    output = F.silu(output) if activation == "silu" else output
    return output, state if return_state else None


def _taps(shifted: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """``sum_w weight_w * shifted_w``, oldest first: no transposition, one pass per tap."""
    weight = weight.to(shifted[0].dtype)
    output = (
        shifted[-1] * weight[:, -1]
        if bias is None
        else torch.addcmul(bias.to(weight.dtype), shifted[-1], weight[:, -1])
    )
    for tap, x in enumerate(shifted[:-1]):
        output = torch.addcmul(output, x, weight[:, tap])
    return output


def _last_tokens(padded: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last ``count`` of each row's real tokens (``padded`` starts with ``count`` earlier ones)."""
    if lengths is None:
        return padded[:, padded.shape[1] - count :].clone()
    at = lengths[:, None] + torch.arange(count, device=padded.device)
    return padded.gather(1, at[..., None].expand(-1, -1, padded.shape[2]))


def _packed(
    x: Tensor, initial_state: Tensor, cu_seqlens: Tensor, convolve: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One row in which every sequence has its earlier tokens in front of it, for ``convolve`` to take as any other."""
    before, device = initial_state.shape[1], x.device
    sequence, _, sizes = packing.locate(cu_seqlens, x.shape[1])
    at = torch.arange(x.shape[1], device=device) + (sequence + 1) * before
    step = torch.arange(before, device=device)
    last = (cu_seqlens[1:].to(torch.int64) + torch.arange(len(sizes), device=device) * before)[:, None] + step
    earlier = last - sizes[:, None]
    source = torch.empty(x.shape[1] + earlier.numel(), dtype=torch.int64, device=device)
    source[earlier.flatten()] = torch.arange(earlier.numel(), device=device)
    source[at] = torch.arange(x.shape[1], device=device) + earlier.numel()
    row = torch.cat([initial_state.flatten(0, 1), x[0]])[source]
    return convolve(row[None])[:, at], row[last]


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    accumulate = contract.accumulation_dtype(x)
    kernel = weight.to(accumulate)
    shift = None if bias is None else bias.to(accumulate)
    if cu_seqlens is not None:
        ends = check_offsets(cu_seqlens, x.shape[1])
        pieces = [(x[:, a:b], initial_state[n : n + 1]) for n, (a, b) in enumerate(pairwise(ends))]
    elif lengths is not None:
        pieces = [(x[b : b + 1], initial_state[b : b + 1]) for b in range(x.shape[0])]
    else:
        pieces = [(x, initial_state)]
    outputs, states = [], []
    for row, (piece, state) in enumerate(pieces):
        real = piece.shape[1] if lengths is None else int(lengths[row])
        if real:
            output, state = short_convolution_reference(
                piece[:, :real].to(accumulate), kernel, shift, state.to(accumulate)
            )
            outputs.append(F.pad(output, (0, 0, 0, piece.shape[1] - real)))
        elif piece.shape[1]:
            outputs.append(torch.zeros_like(piece, dtype=accumulate))
        states.append(state.to(x.dtype))
    joined = torch.cat(outputs, dim=1 if cu_seqlens is not None else 0)
    return joined.to(x.dtype), torch.cat(states)
