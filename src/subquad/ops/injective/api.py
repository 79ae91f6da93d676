"""The door to injective linear attention: values weighed by a query's scores about their mean."""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops.injective.reference import injective_reference


class InjectiveState(NamedTuple):
    """What keys and values come to: their number, means, and the sum of their centred products."""

    number: Tensor  # (B,) float32
    key_mean: Tensor  # (B, H, K) float32
    value_mean: Tensor  # (B, H, V)
    covariance: Tensor  # (B, H, K, V): sum_j (k_j - mean k) (v_j - mean v)^T


def injective_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    initial_state: InjectiveState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, InjectiveState | None]:
    """Non-causal linear attention whose weights tell any two queries apart (Han et al. 2024, eq. 5).

    ``w_ij = (scale / n) q_i . k_j - mean_l (scale / n) q_i . k_l + 1 / n`` sums to 1 over the n keys; equal weights
    mean equal queries wherever the centred keys span the key space (n > K). Summed up, ``o_i = mean v + scale C^T q_i``
    with the covariance C of keys and values: an affine map of the query.

    Args:
        q: ``(B, T, H, K)``, after the feature map, one of float64, float32, bfloat16, float16.
        k, v: ``(B, S, H, K)`` and ``(B, S, H, V)``, any S >= 1 (cross).
        scale: of the scores, which are then divided by n; None is ``K**-0.5``.
        mask: ``(B, S)`` bool, True = a real key; padding enters neither means nor sums.
        initial_state: of keys elsewhere, as :func:`injective_state` gives it; the queries read them too.
        return_state: whether to return the state of all keys, float32. States of parts merge exactly, see
            :func:`combine_injective`.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        cu_seqlens_k: the same for keys, where theirs are others (cross); None: those of the queries.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. All but
            ``reference``, which forms every weight, are plain torch.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the state or None. Without any real key the output is zero.

    Raises:
        ValueError, TypeError: a shape, dtype or combination that does not fit; the message says what is needed.

    Example:
        >>> q, k = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> injective_linear_attention(q, k, torch.tensor([0.0, 4.0]).view(1, 2, 1, 1))[0].flatten().tolist()
        [4.0, 6.0]
    """
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_not_empty("q", q)
    _check_keys(k, v, mask)
    contract.check_same_kind("k", k, q)
    if q.shape[2:] != k.shape[2:] or q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must share batch, heads and key width; got q {tuple(q.shape)}, k {tuple(k.shape)}")
    contract.check_scale(scale)
    contract.check_cu_seqlens(cu_seqlens, q)
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, which says where the queries of each sequence lie")
    if cu_seqlens is not None:
        offsets = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        if len(offsets) != len(cu_seqlens):
            raise ValueError(
                f"cu_seqlens and cu_seqlens_k must name equally many sequences; "
                f"got {len(cu_seqlens) - 1} and {len(offsets) - 1}"
            )
        if cu_seqlens_k is None and k.shape[1] != q.shape[1]:
            raise ValueError(
                f"q and k have lengths {q.shape[1]} and {k.shape[1]}: where they differ, cu_seqlens_k must be given"
            )
        _check_packed(offsets, k, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = backends.resolve(backend, q.device, q.dtype)
    accumulate = contract.accumulation_dtype(q)
    query, key, value = (x.to(accumulate) for x in (q, k, v))
    if initial_state is not None:
        _check_state(initial_state, k, v, contract.number_of_states(q, cu_seqlens))
    if chosen == "reference" and initial_state is None:
        output = _reference(query, key, value, scale, mask, cu_seqlens, cu_seqlens_k)
        if not return_state:
            return output.to(v.dtype), None
    state = _summed(key, value, mask, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    if initial_state is not None:
        state = combine_injective(initial_state, state)
    if chosen != "reference" or initial_state is not None:
        output = _read(query, state, scale, cu_seqlens)
    return output.to(v.dtype), state if return_state else None


def injective_state(
    k: Tensor, v: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> InjectiveState:
    """The state of keys ``(B, S, H, K)`` and values ``(B, S, H, V)``: all that queries read of them.

    Args:
        mask, cu_seqlens: as in :func:`injective_linear_attention`.

    Example:
        >>> k = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> [x.flatten().tolist() for x in injective_state(k, 2 * k)]
        [[2.0], [2.0], [4.0], [4.0]]
    """
    _check_keys(k, v, mask)
    _check_packed(cu_seqlens, k, mask)
    accumulate = contract.accumulation_dtype(k)
    return _summed(k.to(accumulate), v.to(accumulate), mask, cu_seqlens)


def injective_read(
    q: Tensor, state: InjectiveState, *, scale: float | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """What queries ``(B, T, H, K)`` read from a state: ``mean v + (scale / n) covariance^T (q)``, in q's dtype.

    ``scale`` and ``cu_seqlens`` (of the queries) are those of :func:`injective_linear_attention`.
    """
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_not_empty("q", q)
    contract.check_scale(scale)
    contract.check_cu_seqlens(cu_seqlens, q)
    _check_state(state, q, state.value_mean, contract.number_of_states(q, cu_seqlens))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _read(q.to(contract.accumulation_dtype(q)), state, scale, cu_seqlens).to(q.dtype)


def combine_injective(first: InjectiveState, second: InjectiveState) -> InjectiveState:
    """The state of two sets of keys together, from that of each (the pairwise update of Chan et al. 1979).

    Example:
        >>> k = torch.randn(1, 8, 2, 4, dtype=torch.float64)
        >>> parts = injective_state(k[:, :3], k[:, :3]), injective_state(k[:, 3:], k[:, 3:])
        >>> whole = injective_state(k, k)
        >>> torch.allclose(combine_injective(*parts).covariance, whole.covariance)
        True
    """
    count = first.number + second.number
    share = (second.number / count.clamp(min=1))[:, None, None]
    key_step, value_step = second.key_mean - first.key_mean, second.value_mean - first.value_mean
    between = (first.number[:, None, None] * share * key_step)[..., None] * value_step[..., None, :]
    return InjectiveState(
        count,
        first.key_mean + share * key_step,
        first.value_mean + share * value_step,
        first.covariance + second.covariance + between,
    )


def _read(q: Tensor, state: InjectiveState, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    mean = state.value_mean.to(q.dtype)
    per_key = scale / state.number.clamp(min=1)
    slope = (per_key[:, None, None, None] * state.covariance).to(q.dtype)
    if cu_seqlens is None:
        return mean[:, None] + torch.einsum("bihk,bhkv->bihv", q, slope)
    output = q.new_zeros(*q.shape[:3], mean.shape[-1])
    for group in packing.by_length(check_offsets(cu_seqlens, q.shape[1]), q.device):
        read = mean[group.sequences, None] + torch.einsum(
            "bihk,bhkv->bihv", packing.take(q, group), slope[group.sequences]
        )
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), read[group.real])
    return output


def _summed(k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> InjectiveState:
    if cu_seqlens is None:
        return _centred(k, v, mask)
    rows, heads = len(cu_seqlens) - 1, k.shape[2]
    state = InjectiveState(
        k.new_zeros(rows),
        k.new_zeros(rows, heads, k.shape[3]),
        v.new_zeros(rows, heads, v.shape[3]),
        k.new_zeros(rows, heads, k.shape[3], v.shape[3]),
    )
    for group in packing.by_length(check_offsets(cu_seqlens, k.shape[1]), k.device):
        part = _centred(packing.take(k, group), packing.take(v, group), group.real)
        state = InjectiveState(*(whole.index_put((group.sequences,), x) for whole, x in zip(state, part)))
    return state


def _centred(k: Tensor, v: Tensor, mask: Tensor | None) -> InjectiveState:
    """Centred before they are multiplied: no large products cancel."""
    if mask is None:
        count = k.new_full((k.shape[0],), k.shape[1])
        key_mean, value_mean = k.mean(1), v.mean(1)
        key, value = k - key_mean[:, None], v
    else:
        real = mask[..., None, None]
        count = mask.sum(1).to(k.dtype)
        number = count.clamp(min=1)[:, None, None]
        value = v.where(real, 0)
        key_mean, value_mean = k.where(real, 0).sum(1) / number, value.sum(1) / number
        key = (k - key_mean[:, None]).where(real, 0)
    value = value - value_mean[:, None]
    return InjectiveState(count, key_mean, value_mean, torch.einsum("bjhk,bjhv->bhkv", key, value))


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    if cu_seqlens is None:
        return injective_reference(q, k, v, scale=scale, mask=mask)
    ends = check_offsets(cu_seqlens, q.shape[1])
    ends_k = ends if cu_seqlens_k is None else check_offsets(cu_seqlens_k, k.shape[1])
    pieces = [
        injective_reference(q[:, a:b], k[:, c:d], v[:, c:d], scale=scale)
        for a, b, c, d in zip(ends, ends[1:], ends_k, ends_k[1:])
        if b > a
    ]
    return torch.cat(pieces, dim=1)


def _check_keys(k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    contract.check_tensor("k", k, 4, "(batch, context time, heads, key width)")
    contract.check_qkv(k, k, v)
    if mask is None:
        return
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(k.shape[:2]):
        raise ValueError(
            f"mask must be bool (batch, keys) = {tuple(k.shape[:2])}, True = keep; got {mask.dtype} {tuple(mask.shape)}"
        )


def _check_packed(cu_seqlens: Tensor | None, k: Tensor, mask: Tensor | None) -> None:
    contract.check_cu_seqlens(cu_seqlens, k)
    if cu_seqlens is not None and mask is not None:
        raise ValueError("packed sequences have no padding: give cu_seqlens or mask, not both")


def _check_state(state: InjectiveState, k: Tensor, v: Tensor, rows: int) -> None:
    if not isinstance(state, InjectiveState):
        raise TypeError(f"initial_state must be an InjectiveState; got {type(state).__name__}")
    heads, width, values = k.shape[-2], k.shape[-1], v.shape[-1]
    shapes = ((rows,), (rows, heads, width), (rows, heads, values), (rows, heads, width, values))
    for name, x, shape in zip(state._fields, state, shapes):
        axes = "(batch or packed sequences, ...)"
        contract.check_argument(f"initial_state.{name}", x, k, shape, axes)
