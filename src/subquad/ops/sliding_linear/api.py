"""The doors to LoLCATs' attention: softmax over a sliding or a terraced window, linear attention over what is older."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops.sliding_linear.blocks import block_form
from subquad.ops.sliding_linear.reference import sliding_linear_reference, window_start


class SlidingLinearState(NamedTuple):
    """The last tokens, newest last, and sums over all that are older. Slots before the first token hold zeros.

    There are ``window - 1`` slots, ``2 window - 1`` of the terraced form.
    """

    keys: Tensor  # (B, L, G, K)
    values: Tensor  # (B, L, G, V)
    features: Tensor  # (B, L, P, F), of the keys
    state: Tensor  # (B, P, F, V) float32
    normaliser: Tensor  # (B, P, F) float32
    seen: Tensor  # (B,) int64, tokens so far


def sliding_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: SlidingLinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SlidingLinearState | None]:
    """Softmax over the last ``window`` tokens and linear attention over all older ones (Zhang et al. 2025, eq. 6).

    With ``M_t = {t - w < j <= t}`` and ``m_t = max_{j in M_t} s_tj``, ``s = scale q k^T``::

        o_t = [ sum_{M_t} g e^{s_tj - m_t} v_j + phi(q_t) sum_{j <= t - w} phi(k_j) v_j^T ] / [ the same with v = 1 ]

    m_t sets the balance of the two terms, so it is part of the definition, and gradients flow through it.

    Args:
        q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        k, v: ``(B, T, G, K)`` and ``(B, T, G, V)``; H is a multiple of G (grouped heads).
        phi_q: ``(B, T, H, F)``, the queries' features, >= 0.
        phi_k: ``(B, T, P, F)``, the keys' features, >= 0; P is H, or G for maps that a group of heads shares.
        mix: ``(H,)``, g > 0, the weight of the window.
        window: w, tokens, the query's own included.
        scale: of the scores; None is ``K**-0.5``.
        initial_state: of earlier tokens.
        return_state: whether to return the state after the last token.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; all but the first are one form in blocks.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the state or None.

    Raises:
        ValueError, TypeError: a shape, dtype or combination that does not fit; the message says what is needed.

    Example: a window of one token at weight 1, and even features: the mean of this token and of all before it.
        >>> x = torch.zeros(1, 3, 1, 1)
        >>> v = torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1, 1)
        >>> sliding_linear_attention(x, x, v, x + 1, x + 1, torch.ones(1), window=1)[0].flatten().tolist()
        [2.0, 3.0, 5.0]
    """
    return _run(
        "sliding_linear_attention", False, q, k, v, phi_q, phi_k, mix, window, scale, initial_state, return_state,
        cu_seqlens, backend,
    )  # fmt: skip


def terraced_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: SlidingLinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SlidingLinearState | None]:
    """As :func:`sliding_linear_attention` with windows that move by whole blocks (Zhang et al. 2025, figure 3).

    Tokens are cut into blocks of ``window`` from a sequence's first. A query sees its own block up to itself and the
    whole block before it by softmax, and all older blocks by linear attention.
    """
    return _run(
        "terraced_linear_attention", True, q, k, v, phi_q, phi_k, mix, window, scale, initial_state, return_state,
        cu_seqlens, backend,
    )  # fmt: skip


def _run(
    name: str,
    terraced: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor,
    window: int,
    scale: float | None,
    initial_state: SlidingLinearState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, SlidingLinearState | None]:
    _check(q, k, v, phi_q, phi_k, mix, window, terraced, initial_state, cu_seqlens)
    contract.check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = backends.resolve(backend, q.device, q.dtype)
    wide = contract.accumulation_dtype(q)
    tokens = _Tokens(q.to(wide), k.to(wide), v.to(wide), phi_q.to(wide), phi_k.to(wide))
    form = _Form(mix.to(wide), window, terraced, scale, chosen == "reference")
    watch = dynamics.watching(name, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
    if watch is not None:
        return watch.take(_system(name, tokens, form))
    if cu_seqlens is None:
        output, state = _attend(tokens, form, initial_state, None, return_state)
    else:
        output, state = _packed(tokens, form, initial_state, cu_seqlens, return_state)
    if state is not None:
        state = state._replace(
            keys=state.keys.to(k.dtype), values=state.values.to(v.dtype), features=state.features.to(phi_k.dtype)
        )
    return output.to(v.dtype), state


class _Tokens(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Tokens":
        return _Tokens(*map(function, self))


class _Form(NamedTuple):
    mix: Tensor
    window: int
    terraced: bool
    scale: float
    by_definition: bool

    @property
    def slots(self) -> int:
        return (2 * self.window if self.terraced else self.window) - 1


def _attend(
    x: _Tokens, form: _Form, state: SlidingLinearState | None, sizes: Tensor | None, return_state: bool
) -> tuple[Tensor, SlidingLinearState | None]:
    """``sizes (B,)``: how many tokens of each row are real; the rest lies behind them. None: all."""
    if state is None and not form.by_definition:
        output = block_form(*x, form.mix, form.window, form.terraced, form.scale)
        return output, _append(_empty(x, form), x, form, sizes) if return_state else None
    earlier = _empty(x, form) if state is None else _like_tokens(state, x)
    if form.by_definition:
        output = _read(x, form, earlier)
        return output, _append(earlier, x, form, sizes) if return_state else None
    outputs, time = [], x.q.shape[1]
    for first in range(0, time, form.window):
        piece = x.map(lambda t, first=first: t[:, first : first + form.window])  # type: ignore[misc]
        outputs.append(_read(piece, form, earlier))
        if return_state or first + form.window < time:
            real = None if sizes is None else (sizes - first).clamp(0, piece.q.shape[1])
            earlier = _append(earlier, piece, form, real)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], earlier if return_state else None


def _read(x: _Tokens, form: _Form, earlier: SlidingLinearState) -> Tensor:
    """The definition, on new tokens behind the stored ones."""
    heads, time = x.q.shape[2], x.q.shape[1]

    def repeated(t: Tensor, dim: int = 2) -> Tensor:
        return t if t.shape[dim] == heads else t.repeat_interleave(heads // t.shape[dim], dim=dim)

    behind = earlier.seen[:, None]
    at = behind + torch.arange(time, device=x.q.device)
    stored = behind + torch.arange(-earlier.keys.shape[1], 0, device=x.q.device)
    stored = stored.where(stored >= window_start(behind, form.window, form.terraced), -1)
    return sliding_linear_reference(
        x.q,
        repeated(torch.cat([earlier.keys, x.k], 1)),
        repeated(torch.cat([earlier.values, x.v], 1)),
        x.phi_q,
        repeated(torch.cat([earlier.features, x.phi_k], 1)),
        form.mix,
        at,
        torch.cat([stored, at], 1),
        form.window,
        form.terraced,
        form.scale,
        repeated(earlier.state, 1),
        repeated(earlier.normaliser, 1),
    )


def _append(state: SlidingLinearState, x: _Tokens, form: _Form, sizes: Tensor | None) -> SlidingLinearState:
    """The state with new tokens: what no later query sees by softmax goes into the sums."""
    time, slots = x.k.shape[1], form.slots
    added = torch.full_like(state.seen, time) if sizes is None else sizes
    seen = state.seen + added
    position = state.seen[:, None] + torch.arange(-slots, time, device=seen.device)
    first = window_start(state.seen[:, None], form.window, form.terraced).clamp(min=0)
    leaving = (position >= first) & (position < window_start(seen[:, None], form.window, form.terraced))
    keys, values, features = (
        torch.cat(pair, 1) for pair in ((state.keys, x.k), (state.values, x.v), (state.features, x.phi_k))
    )
    groups = state.state.shape[1]
    gone = features.where(leaving[..., None, None], 0)
    written = values if values.shape[2] == groups else values.repeat_interleave(groups // values.shape[2], dim=2)
    sums = state.state + torch.einsum("bspf,bspv->bpfv", gone, written)
    normaliser = state.normaliser + gone.sum(1)

    def last(t: Tensor) -> Tensor:
        if sizes is None:
            return t[:, time:]
        at = (added[:, None] + torch.arange(slots, device=seen.device))[..., None, None]
        return t.gather(1, at.expand(-1, -1, *t.shape[2:]))

    return SlidingLinearState(last(keys), last(values), last(features), sums, normaliser, seen)


def _empty(x: _Tokens, form: _Form, rows: int | None = None) -> SlidingLinearState:
    rows = x.k.shape[0] if rows is None else rows
    keys, values, features = (t.new_zeros(rows, form.slots, *t.shape[2:]) for t in (x.k, x.v, x.phi_k))
    groups, width = x.phi_k.shape[2:]
    return SlidingLinearState(
        keys,
        values,
        features,
        x.v.new_zeros(rows, groups, width, x.v.shape[3]),
        x.v.new_zeros(rows, groups, width),
        torch.zeros(rows, dtype=torch.int64, device=x.v.device),
    )


def _like_tokens(state: SlidingLinearState, x: _Tokens) -> SlidingLinearState:
    return SlidingLinearState(*(t.to(x.q.dtype) if t.is_floating_point() else t for t in state))


def _packed(
    x: _Tokens, form: _Form, state: SlidingLinearState | None, cu_seqlens: Tensor, return_state: bool
) -> tuple[Tensor, SlidingLinearState | None]:
    offsets = check_offsets(cu_seqlens, x.q.shape[1])
    output = x.v.new_zeros(*x.q.shape[:3], x.v.shape[3])
    first = _empty(x, form, len(offsets) - 1) if state is None else _like_tokens(state, x)
    kept = first
    for group in packing.by_length(offsets, x.q.device):
        own = None if state is None else SlidingLinearState(*(t[group.sequences] for t in first))
        taken = x.map(functools.partial(packing.take, group=group))
        o, last = _attend(taken, form, own, group.real.sum(1), return_state)
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
        if last is not None:
            kept = SlidingLinearState(*(a.index_copy(0, group.sequences, b) for a, b in zip(kept, last)))
    return output, kept if return_state else None


def _system(name: str, x: _Tokens, form: _Form) -> dynamics.KeptTokens:
    """The table of weights, for analysis: token by token as they would be kept, and the sums beside them."""
    time, heads = x.q.shape[1:3]
    unit = torch.eye(time, dtype=torch.float64, device=x.q.device)[None, :, None].expand(x.q.shape[0], -1, heads, -1)
    doubled = x._replace(v=unit).map(lambda t: t.double())
    form = form._replace(mix=form.mix.double())
    table = _read(doubled, form, _empty(doubled, form))
    values = x.v.repeat_interleave(heads // x.v.shape[2], dim=2)[:, :, None]
    besides = x.phi_k.shape[3] * (x.v.shape[3] + 1)
    return dynamics.KeptTokens(name, values, table.transpose(1, 2), x.q.shape[3], form.slots, besides)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor,
    window: int,
    terraced: bool,
    state: SlidingLinearState | None,
    cu_seqlens: Tensor | None,
) -> None:
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_tensor("k", k, 4, "(batch, time, key heads, key width)")
    contract.check_tensor("v", v, 4, "(batch, time, key heads, value width)")
    contract.check_same_kind("k", k, q)
    contract.check_same_kind("v", v, q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        contract.check_not_empty(name, x)
    batch, time, heads, width = q.shape
    groups = k.shape[2]
    if k.shape != (batch, time, groups, width) or v.shape[:3] != k.shape[:3] or heads % groups:
        raise ValueError(
            "q (B, T, H, K), k (B, T, G, K) and v (B, T, G, V) must agree, H a multiple of G; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    contract.check_tensor("phi_q", phi_q, 4, "(batch, time, heads, features)")
    contract.check_tensor("phi_k", phi_k, 4, "(batch, time, heads, features)")
    features = phi_q.shape[3]
    contract.check_argument("phi_q", phi_q, q, (batch, time, heads, features), "(batch, time, heads, features)")
    if phi_k.shape[2] not in (groups, heads) or phi_k.shape != (batch, time, phi_k.shape[2], features) or not features:
        raise ValueError(
            f"phi_k must be (batch, time, heads, features) with {heads} heads, or {groups} that groups share, and "
            f"phi_q's {features} features; it has shape {tuple(phi_k.shape)}"
        )
    contract.check_argument("mix", mix, q, (heads,), "(heads,)")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be an integer >= 1; got {window!r}")
    contract.check_cu_seqlens(cu_seqlens, q)
    if state is not None:
        rows, slots = contract.number_of_states(q, cu_seqlens), (2 * window if terraced else window) - 1
        shared = phi_k.shape[2]
        for name, x, shape in (
            ("keys", state.keys, (rows, slots, groups, width)),
            ("values", state.values, (rows, slots, groups, v.shape[3])),
            ("features", state.features, (rows, slots, shared, features)),
            ("state", state.state, (rows, shared, features, v.shape[3])),
            ("normaliser", state.normaliser, (rows, shared, features)),
        ):
            contract.check_argument(f"initial_state.{name}", x, q, shape, "as returned for this window")
        if state.seen.shape != (rows,) or state.seen.is_floating_point():
            raise ValueError(f"initial_state.seen must be integers of shape {(rows,)}; got {tuple(state.seen.shape)}")
