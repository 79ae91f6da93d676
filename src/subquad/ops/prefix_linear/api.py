"""The door to prefix linear attention: a causal op that starts from what it read of the whole prefix."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.kernels.taylor.features import sum_features, taylor_features
from subquad.ops import _contract as contract
from subquad.ops.linear.api import NormalizedState, linear_attention
from subquad.ops.prefix_linear.reference import prefix_linear_attention_reference
from subquad.ops.taylor.api import taylor_linear_attention

FEATURES = ("taylor", "identity")
EPS = {"taylor": 1e-12, "identity": 1e-6}  # those of taylor_linear_attention and linear_attention


def prefix_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_lengths: Tensor,
    features: str = "taylor",
    normalize: bool = True,
    mask: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """Linear attention over the tokens so far, plus a second set of keys and values of the whole prefix.

    With M the prefix length of a row and ``w, w'`` the weights of ``k`` and ``prefix_k``::

        o_t = (sum_{j <= t} w_tj v_j + sum_{j < M} w'_tj v'_j) / (sum_{j <= t} w_tj + sum_{j < M} w'_tj)

    for every t, those inside the prefix included (Arora et al. 2024b, section 4). It is the causal op started from the
    sums over the prefix; from the state that it returns, the causal op itself goes on.

    Args:
        q, k: ``(B, T, H, d)``, one of float64, float32, bfloat16, float16.
        v: ``(B, T, H, V)``.
        prefix_k, prefix_v: the same shapes; read at the first ``prefix_lengths`` tokens of a row only.
        prefix_lengths: ``(B,)`` integers in 0..T, or ``(N,)`` with packed sequences.
        features: ``"taylor"``: the map of :func:`subquad.ops.taylor_linear_attention`, built inside; ``"identity"``: q
            and keys are features already, as for :func:`subquad.ops.linear_attention`.
        normalize: divide by the sum of the weights.
        mask: ``(B, T)`` bool, True = a real key, at the beginning of each row; a padded one weighs nothing.
        return_state: whether to return the state after the last token, that of the causal op.
        cu_seqlens, chunk_size, backend: see :func:`subquad.ops.linear_attention`.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example:
        >>> zero, v = torch.zeros(1, 3, 1, 4), torch.tensor([3.0, 6.0, 9.0]).view(1, 3, 1, 1)
        >>> lengths = torch.tensor([2])  # even weights: the first token sees itself and both of the prefix
        >>> prefix_linear_attention(zero, zero, v, zero, v, prefix_lengths=lengths)[0].flatten().tolist()
        [4.0, 4.5, 5.400000095367432]
    """
    contract.check_qkv(q, k, v)
    for name, x, like in (("prefix_k", prefix_k, k), ("prefix_v", prefix_v, v)):
        contract.check_argument(name, x, q, like.shape, "the shape of " + name.removeprefix("prefix_"))
        contract.check_same_kind(name, x, q)
    contract.check_cu_seqlens(cu_seqlens, q)
    contract.check_chunk_size(chunk_size)
    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(map(repr, FEATURES))}; got {features!r}")
    visible = prefix_mask(prefix_lengths, q, cu_seqlens)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != q.shape[:2] or cu_seqlens is not None):
        raise ValueError(
            f"mask must be bool (batch, time) = {tuple(q.shape[:2])}, without cu_seqlens; got {tuple(mask.shape)}"
        )
    taylor = features == "taylor"
    if backends.resolve(backend, q.device, q.dtype) == "reference":
        return _reference(q, k, v, prefix_k, prefix_v, visible, taylor, normalize, mask, return_state, cu_seqlens)
    accumulate = contract.accumulation_dtype(v)
    values = prefix_v.to(accumulate)
    if normalize:
        values = torch.cat([values, values.new_ones(1).expand(*v.shape[:3], 1)], dim=-1)
    start = _encode(prefix_k.to(accumulate), values * visible[..., None, None].to(accumulate), taylor, cu_seqlens)
    options: dict[str, Any] = {
        "normalize": normalize,
        "initial_state": NormalizedState(start[..., :-1], start[..., -1]) if normalize else start,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "backend": backend,
    }
    if taylor:
        return taylor_linear_attention(q, k, v, mask=mask, **options)
    if mask is not None:
        k, v = (x.where(mask[..., None, None], 0) for x in (k, v))
    return linear_attention(q, k, v, **options)


def prefix_mask(prefix_lengths: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``(B, T)`` bool, True inside the prefixes of ``x (B, T, ...)``.

    Raises:
        ValueError, TypeError: lengths that are no integers, of another shape, or outside 0..T.
    """
    rows = contract.number_of_states(x, cu_seqlens)
    if not isinstance(prefix_lengths, Tensor) or prefix_lengths.is_floating_point():
        raise TypeError("prefix_lengths must be an integer tensor (batch,)")
    if tuple(prefix_lengths.shape) != (rows,):
        raise ValueError(f"prefix_lengths must be (batch,) = {(rows,)}; it has shape {tuple(prefix_lengths.shape)}")
    if cu_seqlens is None:
        place = torch.arange(x.shape[1], device=x.device)
        sizes = torch.full_like(prefix_lengths, x.shape[1])
        inside = place < prefix_lengths[:, None]
    else:
        places = packing.locate(cu_seqlens, x.shape[1])
        sizes, inside = places.sizes, (places.place < prefix_lengths[places.sequence])[None]
    if contract.values_may_be_read(x) and bool(((prefix_lengths < 0) | (prefix_lengths > sizes)).any()):
        raise ValueError(
            f"prefix_lengths must lie between 0 and the row's length {sizes.tolist()}; got {prefix_lengths.tolist()}"
        )
    return inside


def _encode(key: Tensor, values: Tensor, taylor: bool, cu_seqlens: Tensor | None) -> Tensor:
    """The sums over the prefix ``(B or N, H, F, V)``; values outside it are zero."""

    def total(key: Tensor, values: Tensor) -> Tensor:
        if taylor:
            return sum_features(key, values, key.shape[-1] ** -0.5)
        return torch.einsum("bthf,bthv->bhfv", key, values)

    if cu_seqlens is None:
        return total(key, values)
    offsets = check_offsets(cu_seqlens, key.shape[1])
    sums: Tensor | None = None
    for group in packing.by_length(offsets, key.device):
        own = total(packing.take(key, group), packing.take(values, group))
        sums = own.new_zeros(len(offsets) - 1, *own.shape[1:]) if sums is None else sums
        sums = sums.index_put((group.sequences,), own)
    assert sums is not None
    return sums


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    visible: Tensor,
    taylor: bool,
    normalize: bool,
    mask: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    accumulate = contract.accumulation_dtype(v)
    phi = taylor_features if taylor else lambda x: x
    query, key, prefix_key = (phi(x.to(accumulate)) for x in (q, k, prefix_k))
    values, prefix_values = v.to(accumulate), prefix_v.to(accumulate)
    real = torch.ones_like(visible) if mask is None else mask
    if cu_seqlens is None:
        pieces = [(slice(None), slice(None))]
    else:
        offsets = check_offsets(cu_seqlens, q.shape[1])
        pieces = [(slice(None), slice(a, b)) for a, b in pairwise(offsets)]
    outputs, states = [], []
    for piece in pieces:
        own, own_prefix = key[piece] * real[piece][..., None, None], prefix_key[piece] * visible[piece][..., None, None]
        if own.shape[1]:
            outputs.append(
                prefix_linear_attention_reference(
                    torch.einsum("bihf,bjhf->bhij", query[piece], own).tril(),
                    torch.einsum("bihf,bjhf->bhij", query[piece], own_prefix),
                    values[piece],
                    prefix_values[piece],
                    normalize=normalize,
                    eps=EPS["taylor" if taylor else "identity"],
                )
            )
        state = torch.einsum("bthf,bthv->bhfv", own, values[piece])
        state = state + torch.einsum("bthf,bthv->bhfv", own_prefix, prefix_values[piece])
        states.append((state, (own + own_prefix).sum(1)))
    output = torch.cat(outputs, dim=1).to(v.dtype)
    if not return_state:
        return output, None
    state, normalizer = (torch.cat(x) for x in zip(*states))
    return output, NormalizedState(state, normalizer) if normalize else state
