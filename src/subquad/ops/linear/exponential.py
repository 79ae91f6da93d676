"""Linear attention whose features are exponentials, given by their logarithms so that none of them overflows.

The state is kept divided by the largest key feature so far, as an online softmax keeps its sums: a state that shrinks
where a larger key comes, which is the recurrence with one decay per head (``simple_gla``).
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops.gla.api import simple_gla
from subquad.ops.linear.api import NormalizedState, _check_cross, linear_attention

LARGEST_LOGARITHM = 80.0  # exp of it is a float32
NOTHING_YET = -1e30  # the largest key logarithm before any key; -inf would meet -inf


class ExponentialState(NamedTuple):
    """The sums of normalised linear attention, divided by ``exp(log_scale)``."""

    state: Tensor  # (B, H, K, V) float32
    normalizer: Tensor  # (B, H, K) float32
    log_scale: Tensor  # (B, H) float32


def exponential_linear_attention(
    log_q: Tensor,
    log_k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    initial_state: ExponentialState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, ExponentialState | None]:
    """``o_t = sum_j w_tj v_j / sum_j w_tj`` with ``w_tj = sum_f exp(log_q_tf + log_k_jf)``.

    Normalised linear attention on the features ``exp(log_q)`` and ``exp(log_k)``, which are never formed as they are:
    each query is divided by its largest feature, which cancels, and all keys by the largest so far. A query that weighs
    nothing, because all its weights are smaller than float32 can tell beside that, reads zero.

    Args:
        log_q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16; exponentials are taken in float32 or above.
        log_k, v: ``(B, S, H, K)`` and ``(B, S, H, V)``; S = T if causal, any S >= 1 (cross-attention) if not.
        causal: whether token t sees the keys up to t only.
        eps: added to the denominator ``sum_j w_tj``.
        mask: ``(B, S)`` bool, True = a real key.
        initial_state: of earlier tokens; see :class:`ExponentialState`.
        return_state: whether to return that state after the last token.
        cu_seqlens, chunk_size, backend: see :func:`subquad.ops.linear_attention`.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit; the message says what is needed.

    Example:
        >>> log_q = log_k = torch.full((1, 3, 1, 2), 500.0)  # exp(500) is no float32
        >>> v = torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1, 1)
        >>> exponential_linear_attention(log_q, log_k, v, eps=0.0)[0].flatten().tolist()
        [2.0, 3.0, 5.0]
    """
    if causal:
        contract.check_qkv(log_q, log_k, v)
    else:
        _check_cross(log_q, log_k, v, cu_seqlens)
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0; got {eps!r}")
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, log_q)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != log_k.shape[:2] or cu_seqlens is not None):
        raise ValueError(
            f"mask must be bool (batch, keys) = {tuple(log_k.shape[:2])}, without cu_seqlens; got {tuple(mask.shape)}"
        )
    accumulate = contract.accumulation_dtype(v)
    start = _start(initial_state, log_q, v, cu_seqlens, accumulate)
    query, key, values = (x.to(accumulate) for x in (log_q, log_k, v))
    if mask is not None:
        key, values = (x.where(mask[..., None, None], fill) for x, fill in ((key, -torch.inf), (values, 0)))
    common: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "return_state": True,
        "backend": backend,
    }
    if backends.resolve(backend, v.device, v.dtype) == "reference":
        pair = NormalizedState(*(_times_exp(x, start.log_scale) for x in start[:2]))
        output, found = linear_attention(
            query.exp(), key.exp(), values, causal=causal, normalize=True, eps=eps, initial_state=pair, **common
        )
        last = ExponentialState(*cast(NormalizedState, found), torch.zeros_like(start.log_scale))
        return output.to(v.dtype), last if return_state else None

    largest_query = query.detach().amax(-1)
    features = (query - largest_query[..., None]).exp()
    values = torch.cat([values, values.new_ones(1).expand(*values.shape[:3], 1)], dim=-1)
    joined_start = torch.cat([start.state, start.normalizer[..., None]], dim=-1)
    largest = key.detach().amax(-1)  # (B, S, H)
    if causal:
        before, after, final = _running_largest(largest, start.log_scale, cu_seqlens)
        joined, state = simple_gla(
            features,
            (key - after[..., None]).exp(),
            values,
            before - after,
            scale=1.0,
            initial_state=joined_start,
            **common,
        )
    else:
        final = _largest_of_rows(largest, start.log_scale, cu_seqlens)
        after = final[:, None] if cu_seqlens is None else final[packing.locate(cu_seqlens, key.shape[1]).sequence][None]
        joined, found = linear_attention(
            features,
            (key - after[..., None]).exp(),
            values,
            causal=False,
            initial_state=_times_exp(joined_start, start.log_scale - final),
            **common,
        )
        state = cast(Tensor, found)
    assert state is not None
    own_eps = eps * (-(largest_query + after)).clamp(max=LARGEST_LOGARITHM).exp()
    # where all that a query could weigh is below float's range, it reads zero
    denominator = (joined[..., -1:] + own_eps[..., None]).clamp(min=torch.finfo(accumulate).tiny)
    output = joined[..., :-1] / denominator
    last = ExponentialState(state[..., :-1], state[..., -1], final)
    return output.to(v.dtype), last if return_state else None


def empty_exponential_state(
    batch: int, heads: int, width: int, columns: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> ExponentialState:
    """The state before any token."""
    state = torch.zeros(batch, heads, width, columns, device=device, dtype=dtype)
    return ExponentialState(state, state[..., 0].clone(), torch.full_like(state[..., 0, 0], NOTHING_YET))


def _start(
    state: ExponentialState | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> ExponentialState:
    shape = (contract.number_of_states(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3])
    if state is None:
        return empty_exponential_state(*shape, q.device, dtype)
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError("initial_state must be an ExponentialState (state, normalizer, log_scale)")
    axes = "(batch or packed sequences, heads, key width, value width)"
    for name, leaf, own, what in (
        ("state", state[0], shape, axes),
        ("normalizer", state[1], shape[:3], axes.replace(", value width", "")),
        ("log_scale", state[2], shape[:2], axes.replace(", key width, value width", "")),
    ):
        contract.check_argument(f"initial_state.{name}", leaf, q, own, what)
    return ExponentialState(*(leaf.to(dtype) for leaf in state))


def _times_exp(x: Tensor, log_factor: Tensor) -> Tensor:
    return x * log_factor.exp().reshape(*log_factor.shape, *[1] * (x.ndim - log_factor.ndim))


def _largest_of_rows(largest: Tensor, start: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return torch.maximum(largest.amax(1), start)
    at = packing.locate(cu_seqlens, largest.shape[1]).sequence[:, None].expand(-1, largest.shape[2])
    return start.scatter_reduce(0, at, largest[0], "amax")


def _running_largest(largest: Tensor, start: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logarithm before each token and with it ``(B, T, H)``, and after the last ``(B or N, H)``."""
    if cu_seqlens is None:
        running = torch.cat([start[:, None], largest], dim=1).cummax(1).values
        return running[:, :-1], running[:, 1:], running[:, -1]
    before, after, final = torch.zeros_like(largest), torch.zeros_like(largest), start.clone()
    for group in packing.by_length(check_offsets(cu_seqlens, largest.shape[1]), largest.device):
        own = largest[0][group.tokens].where(group.real[..., None], NOTHING_YET)
        running = torch.cat([start[group.sequences][:, None], own], dim=1).cummax(1).values
        tokens = group.tokens[group.real]
        before[0, tokens], after[0, tokens] = running[:, :-1][group.real], running[:, 1:][group.real]
        final[group.sequences] = running[:, -1]
    return before, after, final
