"""The doors to the additive recurrence: attention itself, and its keys and gates for those who turn keys in between."""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.prefix import log_mass as running
from subquad.ops import _contract as contract
from subquad.ops._packed import each_sequence
from subquad.ops.additive.reference import additive_attention_reference, full_additive_attention_reference
from subquad.ops.gla import gla
from subquad.ops.linear import linear_attention


class AdditiveState(NamedTuple):
    """What additive attention carries: weighted means of the values, and the logarithm of the mass behind them."""

    state: Tensor  # (B, H, K, V) float32
    log_mass: Tensor  # (B, H, K) float32; -inf: nothing yet


class Gates(NamedTuple):
    """The additive recurrence as gated linear attention: keys, log decays, and the log mass after the last token."""

    key: Tensor  # (B, T, H, K) float32, e^{k_t - z_t}, in [0, 1]
    log_decay: Tensor  # (B, T, H, K) float32, z_{t-1} - z_t, at most 0
    log_mass: Tensor  # (B or N, H, K) float32


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    initial_mass: float = 0.0,
    initial_state: AdditiveState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, AdditiveState | None]:
    """``o_t = S_t^T q_t``, row c of S_t the mean of v under ``softmax_{j<=t}(k_jc)`` (LightNet, Qin et al. 2024).

    The key is its own gate: a token forgets as much of the past as its weight ``e^k`` is large beside it. Without
    ``causal`` the softmax is over all tokens, whatever their order or number of dimensions.

    Args:
        q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        k, v: ``(B, S, H, K)`` and ``(B, S, H, V)``; S = T if causal, any S >= 1 (cross-attention) if not. A key of -inf
            leaves its token out of its channel.
        causal: whether token t sees the keys up to t only.
        scale: factor of the output; None is 1.
        initial_mass: what the sum of weights starts from, at the value 0: 0 as in the paper, 1 in its authors' library.
        initial_state: an :class:`AdditiveState` of earlier tokens (causal only). Packed: one row per sequence.
        return_state: whether to return the state after the last token (causal only).
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one (self only).
        chunk_size: tokens per chunk; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. The running mass
            is torch's own scan on all but ``cpu``; the non-causal form is two matrix products on every backend.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example:
        >>> q = torch.ones(1, 3, 1, 1)
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> additive_attention(q, torch.zeros(1, 3, 1, 1), v)[0].flatten().round(decimals=4).tolist()
        [1.0, 1.5, 3.0]
    """
    contract.check_scale(scale)
    scale = 1.0 if scale is None else float(scale)
    if not causal:
        return _full(q, k, v, scale, initial_mass, initial_state, return_state, cu_seqlens, chunk_size, backend)
    contract.check_qkv(q, k, v)
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, q)
    accumulate = contract.accumulation_dtype(q)
    shape = (contract.number_of_states(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3])
    state, mass = _start(initial_state, initial_mass, q, shape)
    if backends.resolve(backend, q.device, q.dtype) == "reference":

        def define(q: Tensor, k: Tensor, v: Tensor, own: AdditiveState) -> tuple[Tensor, AdditiveState]:
            output, *last = additive_attention_reference(q, k, v, scale=scale, state=own[0], log_mass=own[1])
            return output, AdditiveState(*last)

        operands = [x.to(accumulate) for x in (q, k, v)]
        output, last = each_sequence(define, operands, AdditiveState(state, mass), cu_seqlens)
        return output.to(v.dtype), last if return_state else None
    gates = additive_gates(k, log_mass=mass, cu_seqlens=cu_seqlens, backend=backend)
    # in float32: a key of bfloat16 would be rounded a second time, and with it the mean that it is a share of
    output, after = gla(
        q.to(accumulate),
        gates.key,
        v.to(accumulate),
        gates.log_decay,
        scale=scale,
        initial_state=state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )
    return output.to(v.dtype), None if after is None else AdditiveState(after, gates.log_mass)


def additive_gates(
    k: Tensor,
    *,
    initial_mass: float = 0.0,
    log_mass: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Gates:
    """Keys and log decays by which :func:`additive_attention` is gated linear attention (``scale=1``).

    With z the running log-sum-exp of k, ``key = e^{k_t - z_t}`` and ``log_decay = z_{t-1} - z_t``; where nothing was
    seen before, the log decay is 0. Whoever turns keys by their position (LRPE) does so after this.

    Args:
        k: ``(B, T, H, K)``; -inf leaves a token out of a channel.
        initial_mass: as of :func:`additive_attention`; ``log_mass`` replaces it.
        log_mass: ``(B or N, H, K)``, the log mass after earlier tokens.
        cu_seqlens: as of :func:`additive_attention`.
        backend: as of :func:`additive_attention`.

    Example:
        >>> gates = additive_gates(torch.zeros(1, 3, 1, 1))
        >>> gates.key.flatten().tolist()[:2], gates.log_decay.exp().flatten().tolist()[:2]
        ([1.0, 0.5], [1.0, 0.5])
    """
    contract.check_tensor("k", k, 4, "(batch, time, heads, key width)")
    contract.check_not_empty("k", k)
    contract.check_cu_seqlens(cu_seqlens, k)
    shape = (contract.number_of_states(k, cu_seqlens), *k.shape[2:])
    accumulate = contract.accumulation_dtype(k)
    if log_mass is None:
        first = k.new_full(shape, _log(initial_mass), dtype=accumulate)
    else:
        contract.check_argument("log_mass", log_mass, k, shape, "(batch or packed sequences, heads, key width)")
        first = log_mass.to(accumulate)
    chosen = backends.resolve(backend, k.device, k.dtype)
    wide = k.to(accumulate)
    z, last = running.run(wide.flatten(2), first.flatten(1), cu_seqlens, backend=chosen)
    z, last = z.unflatten(2, k.shape[2:]), last.unflatten(1, k.shape[2:])
    before = torch.cat([first[:, None], z[:, :-1]], 1) if cu_seqlens is None else _before(z, first, cu_seqlens)
    key = (wide - z).where(wide != -torch.inf, -torch.inf).exp()
    return Gates(key, (before - z).where(before != -torch.inf, 0).clamp(max=0), last)


def additive_weights(k: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """``softmax(k)`` over the tokens of each sequence: the keys of the non-causal form, float32 or above.

    Args:
        k: ``(B, S, H, K)``; -inf leaves a token out, and a channel without any token weighs nothing.
        cu_seqlens: as of :func:`additive_attention`.

    Example:
        >>> additive_weights(torch.zeros(1, 4, 1, 1)).flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    contract.check_tensor("k", k, 4, "(batch, time, heads, key width)")
    contract.check_not_empty("k", k)
    contract.check_cu_seqlens(cu_seqlens, k)
    wide = k.to(contract.accumulation_dtype(k))
    if cu_seqlens is None:
        largest = wide.detach().amax(1, keepdim=True)
        weights = (wide - largest.where(largest != -torch.inf, 0)).exp()
        total = weights.sum(1, keepdim=True)
        return weights / total.where(total != 0, 1)
    places = packing.locate(cu_seqlens, k.shape[1])
    at = places.sequence[:, None, None].expand(-1, *k.shape[2:])
    empty = wide.new_full((len(places.sizes), *k.shape[2:]), -torch.inf)
    largest = empty.scatter_reduce(0, at, wide[0].detach(), "amax")
    weights = (wide[0] - largest.where(largest != -torch.inf, 0)[places.sequence]).exp()
    total = torch.zeros_like(empty).index_add(0, places.sequence, weights)
    return (weights / total.where(total != 0, 1)[places.sequence])[None]


def _log(initial_mass: float) -> float:
    if isinstance(initial_mass, bool) or not isinstance(initial_mass, int | float) or initial_mass not in (0, 1):
        raise ValueError(f"initial_mass must be 0 (the paper's) or 1 (its authors' library's); got {initial_mass!r}")
    return 0.0 if initial_mass else -float("inf")


def _start(
    state: AdditiveState | None, initial_mass: float, q: Tensor, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    accumulate = contract.accumulation_dtype(q)
    log = _log(initial_mass)
    if state is None:
        return q.new_zeros(shape, dtype=accumulate), q.new_full(shape[:3], log, dtype=accumulate)
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(
            "initial_state must be an AdditiveState(state, log_mass), as an earlier call returned it; "
            f"got {type(state).__name__}"
        )
    axes = "(batch or packed sequences, heads, key width"
    contract.check_argument("initial_state.state", state[0], q, shape, f"{axes}, value width)")
    contract.check_argument("initial_state.log_mass", state[1], q, shape[:3], f"{axes})")
    return state[0].to(accumulate), state[1].to(accumulate)


def _before(z: Tensor, first: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The log mass before each packed token: its predecessor's, or its sequence's first."""
    places = packing.locate(cu_seqlens, z.shape[1])
    starts = (places.place == 0)[:, None, None]
    return torch.where(starts, first[places.sequence], z[0].roll(1, 0))[None]


def _full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial_mass: float,
    initial_state: AdditiveState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, None]:
    if initial_state is not None or return_state or initial_mass:
        raise ValueError(
            "initial_state, return_state and initial_mass belong to causal=True: all tokens are seen at once"
        )
    contract.check_tensor("k", k, 4, "(batch, context time, heads, key width)")
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_same_kind("k", k, q)
    if backends.resolve(backend, q.device, q.dtype) == "reference" and cu_seqlens is None:
        contract.check_qkv(k, k, v)
        operands = [x.to(contract.accumulation_dtype(q)) for x in (q, k, v)]
        return full_additive_attention_reference(*operands, scale=scale).to(v.dtype), None
    key = additive_weights(k, cu_seqlens=cu_seqlens).to(k.dtype)
    output, _ = linear_attention(
        q, key, v, causal=False, scale=scale, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend
    )
    return output, None
