"""The door to softmax attention, on torch's own ``scaled_dot_product_attention``: what all else is compared with.

Who sees whom is decided by positions (``visibility``). Where no table is needed (plain causal, full, or a window
over unpadded tokens) none is built.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops.softmax import growing
from subquad.ops.softmax.reference import softmax_attention_reference

QUERY_BLOCK = 256  # rows of scores held at once where the log-sum-exp is wanted


class SoftmaxState(NamedTuple):
    """The key/value cache. Of a window it holds the sinks and the last keys that can still be seen."""

    keys: Tensor  # (B, S, G, K)
    values: Tensor  # (B, S, G, V)
    positions: Tensor  # (B, S) int64, a key's index among its row's real tokens; -1: padding


class Sight(NamedTuple):
    """Which keys a query may see."""

    causal: bool
    prefix_lengths: Tensor | None  # (B,)
    window_size: int | None
    num_sinks: int


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    window_size: int | None = None,
    num_sinks: int = 0,
    scale: float | None = None,
    initial_state: SoftmaxState | None = None,
    return_state: bool = False,
    return_log_sum_exp: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SoftmaxState | None] | tuple[Tensor, SoftmaxState | None, Tensor]:
    """``softmax(scale * q k^T) v`` (Vaswani et al. 2017), causal, full, prefix-causal, windowed, self or cross.

    Args:
        q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        k, v: ``(B, S, G, K)`` and ``(B, S, G, V)``; H is a multiple of G (grouped heads). S = T if ``causal``.
        causal: whether a query sees the keys up to its own place only.
        mask: ``(B, S)`` bool, True = a real token. Padded keys are seen by nobody; with ``causal`` the queries are the
            same tokens, and padded ones give zero.
        prefix_lengths: ``(B,)`` integers: the first so many real tokens of a row see each other in both directions.
        window_size: a query sees only the last so many keys, itself included (causal only).
        num_sinks: with a window, the first so many keys that stay visible to all.
        scale: of the scores; None is ``K**-0.5``.
        initial_state: the keys and values of earlier tokens (causal only).
        return_state: whether to return them with the new ones.
        return_log_sum_exp: also return ``(B, T, H)`` log-sum-exps, float32, by which results over disjoint keys merge.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one (self only).
            States then have N rows, padded to the longest.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; all but the first are torch's attention.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, the state or None, and the log-sum-exp if asked for.

    Raises:
        ValueError, TypeError: a shape, dtype or combination that does not fit; the message says what is needed.

    Example:
        >>> q = k = torch.zeros(1, 3, 1, 1)
        >>> v = torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1, 1)
        >>> softmax_attention(q, k, v)[0].flatten().tolist()
        [2.0, 3.0, 5.0]
    """
    _check(q, k, v, causal, mask, prefix_lengths, window_size, num_sinks, initial_state, cu_seqlens)
    contract.check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = backends.resolve(backend, q.device, q.dtype)
    sight = Sight(causal, prefix_lengths, window_size, num_sinks)
    watch = dynamics.watching(
        "softmax_attention", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )
    if watch is not None and causal:
        return watch.take(_kept_tokens(q, k, v, sight, scale, mask))
    log_sum_exp: Tensor | None
    if cu_seqlens is not None:
        output, state, log_sum_exp = _packed(
            q, k, v, sight, scale, initial_state, cu_seqlens, chosen, return_log_sum_exp
        )
    else:
        output, state, log_sum_exp = _attend(q, k, v, sight, scale, mask, initial_state, chosen, return_log_sum_exp)
    kept = state if return_state else None
    if return_log_sum_exp:
        assert log_sum_exp is not None
        return output, kept, log_sum_exp
    return output, kept


def _kept_tokens(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, mask: Tensor | None
) -> dynamics.KeptTokens:
    """The table of weights, for analysis."""
    if mask is not None:
        raise ValueError("softmax_attention is analysed on whole sequences: without a mask")
    batch, time = q.shape[:2]
    positions = torch.arange(time, device=q.device).expand(batch, -1)
    unit = torch.eye(time, dtype=torch.float64, device=q.device)[None, :, None].expand(batch, -1, k.shape[2], -1)
    visible = visibility(positions, positions, sight)
    table, _ = softmax_attention_reference(q.double(), k.double(), unit, visible, scale)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)[:, :, None]
    limit = None if sight.window_size is None else sight.window_size + sight.num_sinks
    return dynamics.KeptTokens("softmax_attention", values, table.transpose(1, 2), q.shape[3], limit)


def visibility(query_positions: Tensor, key_positions: Tensor, sight: Sight) -> Tensor:
    """``(B, T, S)`` bool from the positions ``(B, T)`` of queries and ``(B, S)`` of keys (-1: padding)."""
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    visible = (key >= 0).expand(-1, query.shape[1], -1)
    if not sight.causal:
        return visible
    seen = key <= query
    if sight.window_size is not None:
        seen = seen & ((query - key < sight.window_size) | (key < sight.num_sinks))
    if sight.prefix_lengths is not None:
        seen = seen | (key < sight.prefix_lengths[:, None, None])
    return visible & seen


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None,
    prefix_lengths: Tensor | None,
    window_size: int | None,
    num_sinks: int,
    initial_state: SoftmaxState | None,
    cu_seqlens: Tensor | None,
) -> None:
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_tensor("k", k, 4, "(batch, context time, key heads, key width)")
    contract.check_tensor("v", v, 4, "(batch, context time, key heads, value width)")
    contract.check_same_kind("k", k, q)
    contract.check_same_kind("v", v, q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        contract.check_not_empty(name, x)
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q (B, T, H, K), k (B, S, G, K) and v (B, S, G, V) must agree, H a multiple of G; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    scores = q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
    if scores * 8 >= contract.LARGEST_STORAGE:
        raise ValueError(f"{q.shape[1]} queries by {k.shape[1]} keys are too many: their size in bytes overflows")
    if (causal or cu_seqlens is not None) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal and packed attention need as many keys as queries; got {q.shape[1]} queries and {k.shape[1]} keys "
            "(cross-attention: causal=False; earlier keys: initial_state)"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor, True = a real token; got {getattr(mask, 'dtype', type(mask))}"
            )
        if mask.shape != k.shape[:2] or mask.device != q.device:
            raise ValueError(
                f"mask must be (batch, context time) = {tuple(k.shape[:2])} on {q.device}; "
                f"it has shape {tuple(mask.shape)} on {mask.device}"
            )
        if cu_seqlens is not None:
            raise ValueError("packed sequences have no padding: give cu_seqlens or mask, not both")
    contract.check_cu_seqlens(cu_seqlens, q)
    if prefix_lengths is not None:
        rows = contract.number_of_states(q, cu_seqlens)
        if not isinstance(prefix_lengths, Tensor) or prefix_lengths.is_floating_point():
            raise TypeError("prefix_lengths must be an integer tensor (batch,)")
        if tuple(prefix_lengths.shape) != (rows,):
            raise ValueError(f"prefix_lengths must be (batch,) = {(rows,)}; it has shape {tuple(prefix_lengths.shape)}")
    if window_size is not None and (not isinstance(window_size, int) or window_size < 1):
        raise ValueError(f"window_size must be an integer >= 1 or None; got {window_size!r}")
    if not isinstance(num_sinks, int) or num_sinks < 0:
        raise ValueError(f"num_sinks must be an integer >= 0; got {num_sinks!r}")
    if num_sinks and window_size is None:
        raise ValueError("num_sinks belongs to a window: give window_size too")
    if window_size is not None and prefix_lengths is not None:
        raise ValueError("window_size and prefix_lengths exclude each other: a prefix is seen whole")
    if not causal and (window_size is not None or prefix_lengths is not None or initial_state is not None):
        raise ValueError("window_size, prefix_lengths and initial_state belong to causal attention")
    if initial_state is not None:
        rows = contract.number_of_states(q, cu_seqlens)
        keys, values, positions = initial_state
        length = keys.shape[1] if keys.ndim == 4 else 0
        axes = "(batch, cached time, key heads, width)"
        contract.check_argument("initial_state.keys", keys, q, (rows, length, *k.shape[2:]), axes)
        contract.check_argument("initial_state.values", values, q, (rows, length, *v.shape[2:]), axes)
        if tuple(positions.shape) != (rows, length) or positions.is_floating_point():
            raise ValueError(f"initial_state.positions must be integers of shape {(rows, length)}")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    scale: float,
    mask: Tensor | None,
    state: SoftmaxState | None,
    backend: str,
    want_log_sum_exp: bool,
) -> tuple[Tensor, SoftmaxState, Tensor | None]:
    batch, time = q.shape[:2]
    log_sum_exp = None
    if mask is None:
        positions = torch.arange(k.shape[1], device=q.device).expand(batch, -1)
    else:
        positions = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
    query_positions = positions if sight.causal else torch.zeros_like(positions[:, :1]).expand(-1, time)
    if state is not None and state.keys.shape[1]:
        start = state.positions.amax(dim=1, keepdim=True) + 1
        positions = torch.where(positions >= 0, positions + start, -1)
        query_positions = positions
        earlier = (state.keys.to(k.dtype), state.values.to(v.dtype), state.positions)
        if sight.window_size is None:
            k, v, positions = growing.append(earlier, (k, v, positions))
        else:  # what leaves the window is dropped: nothing grows
            k, v, positions = (torch.cat(pair, 1) for pair in zip(earlier, (k, v, positions)))
    unpadded = mask is None and (state is None or not state.keys.shape[1])

    if backend == "reference" or want_log_sum_exp:
        output, log_sum_exp = _by_query_blocks(q, k, v, query_positions, positions, sight, scale)
    elif unpadded and sight.window_size is None and sight.prefix_lengths is None:
        output = _torch_attention(q, k, v, None, scale, is_causal=sight.causal)
    elif unpadded and sight.window_size is not None and time > 2 * sight.window_size:
        output = _banded(q, k, v, sight.window_size, sight.num_sinks, scale)
    else:
        visible = visibility(query_positions, positions, sight)
        sees_any = visible.any(dim=-1)
        output = _torch_attention(q, k, v, (visible | ~sees_any[..., None])[:, None], scale, is_causal=False)
        output = output * sees_any[..., None, None].to(output.dtype)
    if sight.causal and mask is not None:
        output = output * mask[..., None, None].to(output.dtype)
    return output, _kept(k, v, positions, sight, mask is None), log_sum_exp


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, *, is_causal: bool
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[1] > 1:  # torch's CPU kernel is half as fast on the strided view; for one query a copy costs more
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=is_causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    return output.transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, num_sinks: int, scale: float) -> Tensor:
    """A causal window in blocks of its own size: each block of queries meets two blocks of keys, and the sinks."""
    batch, time = q.shape[:2]
    blocks = -(-time // window)
    padding = blocks * window - time
    device = q.device

    def in_blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (blocks, window))

    def with_previous(x: Tensor) -> Tensor:
        own = in_blocks(x)
        previous = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
        sinks = x[:, None, :num_sinks].expand(-1, blocks, -1, -1, -1)
        return torch.cat([sinks, previous, own], dim=2).flatten(0, 1)

    start = torch.arange(blocks, device=device)[:, None] * window
    query_at = start + torch.arange(window, device=device)
    sink_at = torch.arange(min(num_sinks, time), device=device)
    band_at = start - window + torch.arange(2 * window, device=device)
    distance = query_at[:, :, None] - band_at[:, None, :]
    in_band = (distance >= 0) & (distance < window) & (band_at[:, None, :] >= num_sinks)
    visible = torch.cat([sink_at <= query_at[:, :, None], in_band], dim=-1)
    visible = visible.repeat(batch, 1, 1)[:, None]
    output = _torch_attention(
        in_blocks(q).flatten(0, 1), with_previous(k), with_previous(v), visible, scale, is_causal=False
    )
    return output.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :time]


def _by_query_blocks(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, positions: Tensor, sight: Sight, scale: float
) -> tuple[Tensor, Tensor]:
    accumulate = contract.accumulation_dtype(q)
    key, value = k.to(accumulate), v.to(accumulate)
    outputs, sums = [], []
    for query, at in zip(q.to(accumulate).split(QUERY_BLOCK, 1), query_positions.split(QUERY_BLOCK, 1)):
        visible = visibility(at, positions, sight)
        output, log_sum_exp = softmax_attention_reference(query, key, value, visible, scale)
        outputs.append(output)
        sums.append(log_sum_exp)
    return torch.cat(outputs, 1).to(v.dtype), torch.cat(sums, 1)


def _kept(k: Tensor, v: Tensor, positions: Tensor, sight: Sight, unmasked: bool) -> SoftmaxState:
    """The keys that a later query can still see. ``unmasked``: there is no padding behind those of an earlier state."""
    if sight.window_size is None:
        return SoftmaxState(k, v, positions)
    length, last = positions.shape[1], max(sight.window_size - 1, 1)  # one key at least: it carries the position
    if length <= last + sight.num_sinks:
        return SoftmaxState(k, v, positions)
    if unmasked and not sight.num_sinks:  # a state's padding stands before its keys: the newest are the last columns
        return SoftmaxState(*(x[:, -last:].clone() for x in (k, v, positions)))  # a view would hold all of them
    # sinks first, then the newest real keys; the order within a row is kept, padding goes first among the rest
    newest = positions.amax(dim=1, keepdim=True)
    wanted = (positions >= 0) & ((positions < sight.num_sinks) | (positions > newest - last))
    order = torch.argsort(wanted.to(torch.int8), dim=1, stable=True)[:, -(last + sight.num_sinks) :]
    at = order[..., None, None]
    kept_positions = positions.where(wanted, -1).gather(1, order)
    return SoftmaxState(
        k.gather(1, at.expand(-1, -1, *k.shape[2:])), v.gather(1, at.expand(-1, -1, *v.shape[2:])), kept_positions
    )


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    scale: float,
    state: SoftmaxState | None,
    cu_seqlens: Tensor,
    backend: str,
    want_log_sum_exp: bool,
) -> tuple[Tensor, SoftmaxState, Tensor]:
    output = v.new_zeros(*q.shape[:3], v.shape[3])
    log_sum_exp = torch.zeros(q.shape[:3], dtype=contract.accumulation_dtype(q), device=q.device)
    offsets = check_offsets(cu_seqlens, q.shape[1])
    rows: dict[int, SoftmaxState] = {}
    for group in packing.by_length(offsets, q.device):
        own_state = None if state is None else SoftmaxState(*(x[group.sequences] for x in state))
        prefix = None if sight.prefix_lengths is None else sight.prefix_lengths[group.sequences]
        own_sight = sight._replace(prefix_lengths=prefix)
        ragged = not bool(group.real.all())
        o, last, lse = _attend(
            packing.take(q, group),
            packing.take(k, group),
            packing.take(v, group),
            own_sight,
            scale,
            group.real if ragged else None,
            own_state,
            backend,
            want_log_sum_exp,
        )
        tokens = group.tokens[group.real]
        at = (torch.zeros_like(tokens), tokens)
        output = output.index_put(at, o[group.real])
        if lse is not None:
            log_sum_exp = log_sum_exp.index_put(at, lse[group.real])
        for row, n in enumerate(group.sequences.tolist()):
            rows[n] = SoftmaxState(*(x[row] for x in last))
    return output, _stacked(rows, state, len(offsets) - 1, k, v), log_sum_exp


def _stacked(
    rows: dict[int, SoftmaxState], state: SoftmaxState | None, count: int, k: Tensor, v: Tensor
) -> SoftmaxState:
    """States of single sequences as rows of one, padded in front to the longest."""
    for n in range(count):
        if n not in rows:  # an empty sequence keeps the state it had
            no_positions = torch.empty(0, dtype=torch.int64, device=k.device)
            rows[n] = (
                SoftmaxState(k[0, :0], v[0, :0], no_positions)
                if state is None
                else SoftmaxState(*(x[n] for x in state))
            )
    longest = max(len(row.positions) for row in rows.values())

    def stack(parts: list[Tensor], fill: int) -> Tensor:
        padded = [F.pad(x, (0, 0) * (x.ndim - 1) + (longest - len(x), 0), value=fill) for x in parts]
        return torch.stack(padded)

    ordered = [rows[n] for n in range(count)]
    return SoftmaxState(
        stack([row.keys for row in ordered], 0),
        stack([row.values for row in ordered], 0),
        stack([row.positions for row in ordered], -1),
    )
