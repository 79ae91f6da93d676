"""The door to linear attention without decay: causal or not, self or cross, with or without a normaliser."""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._recurrence import Reference, run_recurrence
from subquad.ops.linear.reference import full_linear_attention_reference, linear_attention_reference


class NormalizedState(NamedTuple):
    """What normalised linear attention carries: the sums of ``k v^T`` and of ``k``."""

    state: Tensor  # (B, H, K, V) float32
    normalizer: Tensor  # (B, H, K) float32


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: Tensor | NormalizedState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """``o_t = scale * sum_j (q_t . k_j) v_j`` over the keys up to t (causal) or all keys (Katharopoulos et al. 2020).

    Args:
        q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16, the feature map already applied.
        k, v: ``(B, S, H, K)`` and ``(B, S, H, V)``; S = T if causal, any S >= 1 (cross-attention) if not.
        causal: whether token t sees the keys up to t only.
        normalize: divide by ``sum_j q_t . k_j + eps``, for features that are not negative; ``scale`` then cancels.
        eps: keeps an empty denominator from dividing by zero.
        scale: factor of the output; None is 1.
        initial_state: ``(B, H, K, V)`` of earlier tokens; with ``normalize`` a pair ``(state, normalizer (B, H, K))``.
        return_state: whether to return that state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one (self only).
        chunk_size: tokens per chunk; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. The non-causal
            form is two matrix products on every backend.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None; with ``normalize`` that is a
        :class:`NormalizedState`.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example:
        >>> q = k = torch.ones(1, 3, 1, 1)
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> linear_attention(q, k, v)[0].flatten().tolist()
        [1.0, 3.0, 9.0]
        >>> linear_attention(q, k, v, causal=False, normalize=True, eps=0.0)[0].flatten().tolist()
        [3.0, 3.0, 3.0]
    """
    if causal:
        contract.check_qkv(q, k, v)
    else:
        _check_cross(q, k, v, cu_seqlens)
    contract.check_scale(scale)
    scale = 1.0 if scale is None or normalize else float(scale)
    if not normalize:
        if isinstance(initial_state, tuple):
            raise TypeError("initial_state must be one tensor; a pair belongs to normalize=True")
        run = _run_causal if causal else _run_full
        return run(q, k, v, scale, initial_state, return_state, cu_seqlens, chunk_size, backend)

    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0; got {eps!r}")
    states = contract.number_of_states(q, cu_seqlens)
    watch = dynamics.watching(
        "linear_attention", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )
    if watch is not None and causal:
        return watch.take(dynamics.matrix_system("linear_attention", q, k, v, scale=scale, normalizer_eps=eps))
    joined = None
    if initial_state is not None:
        if not isinstance(initial_state, tuple) or len(initial_state) != 2:
            raise TypeError("with normalize=True initial_state must be a pair (state, normalizer)")
        state, normalizer = initial_state
        shape = (states, q.shape[2], q.shape[3], v.shape[3])
        axes = "(batch or packed sequences, heads, key width, value width)"
        contract.check_argument("initial_state.state", state, q, shape, axes)
        contract.check_argument("initial_state.normalizer", normalizer, q, shape[:3], axes.replace(", value width", ""))
        joined = torch.cat([state, normalizer[..., None]], dim=-1)
    # one more value channel, constantly 1, carries the denominator through the same recurrence
    values = torch.cat([v, v.new_ones(1).expand(*v.shape[:3], 1)], dim=-1).to(contract.accumulation_dtype(v))
    query, key = q.to(values.dtype), k.to(values.dtype)
    run = _run_causal if causal else _run_full
    joined_output, last = run(query, key, values, scale, joined, return_state, cu_seqlens, chunk_size, backend)
    output = joined_output[..., :-1] / (joined_output[..., -1:] + eps)
    if last is not None:
        return output.to(v.dtype), NormalizedState(last[..., :-1], last[..., -1])
    return output.to(v.dtype), None


def _check_cross(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_tensor("k", k, 4, "(batch, context time, heads, key width)")
    contract.check_qkv(k, k, v)
    contract.check_same_kind("k", k, q)
    contract.check_not_empty("q", q)
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q and k must share batch, heads and key width; got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"packed sequences attend to themselves: q and k must have one length; got {q.shape[1]} and {k.shape[1]}"
        )


def _run_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    return run_recurrence(
        linear_attention_reference,
        q,
        k,
        v,
        gates={},
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


def _run_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, q)
    chosen = backends.resolve(backend, q.device, q.dtype)
    accumulate = contract.accumulation_dtype(q)
    states = contract.number_of_states(q, cu_seqlens)
    shape = (states, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        initial_state = q.new_zeros(shape, dtype=accumulate)
    axes = "(batch or packed sequences, heads, key width, value width)"
    contract.check_argument("initial_state", initial_state, q, shape, axes)
    form: Reference = full_linear_attention_reference if chosen == "reference" else _sum_then_read
    operands = [x.to(accumulate) for x in (q, k, v)]
    initial_state = initial_state.to(accumulate)
    if cu_seqlens is None:
        output, state = form(*operands, scale=scale, initial_state=initial_state)
    else:
        output, state = torch.zeros_like(operands[2]), initial_state
        for group in packing.by_length(check_offsets(cu_seqlens, q.shape[1]), q.device):
            pieces = (packing.take(x, group) for x in operands)
            o, last = form(*pieces, scale=scale, initial_state=initial_state[group.sequences])
            tokens = group.tokens[group.real]
            output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
            state = state.index_put((group.sequences,), last)
    return output.to(v.dtype), state if return_state else None


def _sum_then_read(q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    state = initial_state + torch.einsum("bjhk,bjhv->bhkv", k, v)
    return torch.einsum("bihk,bhkv->bihv", q, scale * state), state
