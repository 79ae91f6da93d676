"""The door to attention with one query over every prefix: checks, then the fastest form that can run."""

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.prefix import dispatch
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence
from subquad.ops.prefix_attention.reference import PrefixState, combine_prefix, prefix_attention_reference

__all__ = ["PrefixState", "combine_prefix", "prefix_attention"]

LARGEST_GPU_WIDTH = 256


def prefix_attention(
    scores: Tensor,
    values: Tensor,
    *,
    initial_state: PrefixState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, PrefixState | None]:
    """``o_t = sum_{j<=t} e^{s_j} v_j / sum_{j<=t} e^{s_j}``: one query over every prefix (Feng et al. 2024).

    Args:
        scores: ``(B, T, H)``, one number per head and token; -inf leaves a token out. Float32 beside narrower values.
        values: ``(B, T, H, V)``, one of float64, float32, bfloat16, float16.
        initial_state: of the tokens before, a :class:`PrefixState`; None: none. Packed: one row per sequence.
        return_state: whether to return the state after the last token.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning.

    Returns:
        The output ``(B, T, H, V)`` in values' dtype (zero while every token was left out), and the last state or None.
        The denominator is exact up to 2^24 tokens of equal score; beyond, one token more no longer changes it.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit; the message says what is needed.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> prefix_attention(torch.zeros(1, 3, 1), values)[0].flatten().tolist()
        [1.0, 1.5, 3.0]
    """
    contract.check_tensor("values", values, 4, "(batch, time, heads, value width)")
    contract.check_not_empty("values", values)
    contract.check_argument("scores", scores, values, values.shape[:3], "(batch, time, heads)")
    contract.check_cu_seqlens(cu_seqlens, values)
    states, heads, width = contract.number_of_states(values, cu_seqlens), values.shape[2], values.shape[3]
    accumulate = contract.accumulation_dtype(values)
    if torch.promote_types(scores.dtype, accumulate) != accumulate:
        raise TypeError(f"float64 scores need float64 values; values are {values.dtype}")
    watch = dynamics.watching(
        "prefix_attention", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )
    if watch is not None:
        return watch.take(_system(scores, values))
    if initial_state is None:
        empty = values.new_zeros(states, heads, dtype=accumulate)
        state = PrefixState(empty - torch.inf, empty, values.new_zeros(states, heads, width, dtype=accumulate))
    else:
        state = _checked(initial_state, values, (states, heads, width))
        state = PrefixState(*(x.to(accumulate) for x in state))
    unsupported = {}
    if width > LARGEST_GPU_WIDTH:
        unsupported["gpu"] = f"its tiles hold {LARGEST_GPU_WIDTH} value channels, not {width}; use backend='chunked'"
    chosen = backends.resolve(backend, values.device, values.dtype, unsupported)
    scores = scores.to(accumulate)
    if chosen == "reference":
        output, last = each_sequence(prefix_attention_reference, (scores, values.to(accumulate)), state, cu_seqlens)
        output = output.to(values.dtype)
    else:
        output, triple = dispatch.run(scores, values, (state[0], state[1], state[2]), cu_seqlens, backend=chosen)
        last = PrefixState(*triple)
    return output, last if return_state else None


def _system(scores: Tensor, values: Tensor) -> dynamics.RecurrentSystem:
    """With ``L_t = log sum_{j<=t} e^{s_j}``: ``o_t = e^{L_{t-1} - L_t} o_{t-1} + e^{s_t - L_t} v_t``."""
    if bool((scores == -torch.inf).any()):
        raise ValueError("prefix_attention is analysed on whole sequences: no score may be -inf")
    scores = scores.double()
    total = torch.logcumsumexp(scores, dim=1)
    decay = torch.cat([torch.zeros_like(total[:, :1]), (total[:, :-1] - total[:, 1:]).exp()], dim=1)
    write = (scores - total).exp()[..., None]
    return dynamics.RecurrentSystem(
        "prefix_attention", values[:, :, None], decay[..., None], write[:, :, None], torch.ones_like(write)
    )


def _checked(state: object, values: Tensor, shape: tuple[int, int, int]) -> PrefixState:
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(
            "initial_state must be a PrefixState(maximum, denominator, numerator), as an earlier call returned it; "
            f"got {type(state).__name__}"
        )
    for name, leaf, own in zip(PrefixState._fields, state, (shape[:2], shape[:2], shape)):
        axes = "(batch or packed sequences, heads" + (", value width)" if len(own) == 3 else ")")
        contract.check_argument(f"initial_state.{name}", leaf, values, own, axes)
    return PrefixState(*state)
