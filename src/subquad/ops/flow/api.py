"""The door to flow attention: non-causal over self or context, or causal with a state of constant size."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.flow.dispatch import flow_gates_cpu
from subquad.kernels.flow.gates import FlowOptions, causal_gates
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops.flow.reference import causal_flow_reference, full_flow_reference
from subquad.ops.linear.api import _check_cross, linear_attention

CAUSAL_CLIP = 10.0
LARGEST_CLIP = 40.0  # sums of e^40 over 10^6 tokens stay inside float32


class FlowState(NamedTuple):
    """What causal flow attention carries: sums over the tokens so far, n of them at each."""

    key_sum: Tensor  # (B, H, K) of k, float32
    query_sum: Tensor  # (B, H, K) of q
    key_flow: Tensor  # (B, H, K) of k n / O
    query_flow: Tensor  # (B, H, K) of q n / I
    competition: Tensor  # (B, H) of exp(O')
    seen: Tensor  # (B,) int64, tokens so far
    state: Tensor  # (B, H, K, V) of k^T c v


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    eps: float = 1e-6,
    clip: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    initial_state: FlowState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, FlowState | None]:
    """Normalised linear attention sharpened by competition among keys and allocation to queries (Wu et al. 2022).

    Keys compete for a fixed outgoing flow, ``c_j = S softmax_j(O'_j)``; queries get a share by their incoming flow,
    ``a_i = sigmoid(I'_i)``; ``o_i = a_i (q_i / I_i) sum_j k_j c_j v_j``. In the causal form every sum ends at the token
    itself, so a key competes with its past only. The non-causal form sums over queries too: the outputs of a row belong
    together, and its queries must not be split over several calls.

    Args:
        q: ``(B, T, H, K)``, not negative (sigmoid, or relu + 1e-6), one of float64, float32, bfloat16, float16.
        k, v: ``(B, S, H, K)``, not negative, and ``(B, S, H, V)``; S = T if causal, any S >= 1 (cross) if not.
        causal: whether token t depends on the tokens up to t only. There is no causal form over a context.
        eps: added to features and sums where flows are formed.
        clip: O' is kept within +-clip before its exponential; None: 10 if causal, no limit if not. The authors' code
            has 1 (which cuts about half of the keys), 5, 10 or none.
        temperature: O' is divided by it first.
        mask: ``(B, S)`` bool, True = a real key, and if causal a real query; padding enters no sum.
        query_mask: ``(B, T)`` bool, True = a real query, for the non-causal form, which sums over queries too.
        initial_state: of earlier tokens (causal only).
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one (self only).
        chunk_size: tokens per chunk of the last, linear sum; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. The gates are
            plain torch but for ``cpu``; the non-causal form is plain torch everywhere.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or combination that does not fit, negative features.

    Example:
        >>> q = k = torch.full((1, 1, 1, 4), 0.5)
        >>> o, _ = flow_attention(q, k, torch.ones(1, 1, 1, 1))  # one token: the share sigmoid(1) of its value
        >>> round(o.item(), 4)
        0.7311
    """
    if causal:
        contract.check_qkv(q, k, v)
    else:
        _check_cross(q, k, v, cu_seqlens)
        if initial_state is not None or return_state:
            raise ValueError("a state belongs to causal flow attention: without it all tokens are read at once")
    options = _options(causal, eps, clip, temperature)
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, q)
    _check_mask("mask", mask, k, cu_seqlens)
    _check_mask("query_mask", query_mask, q, cu_seqlens)
    if causal and query_mask is not None:
        raise ValueError("query_mask belongs to causal=False; causal queries and keys are the same tokens")
    if contract.values_may_be_read(q):
        for name, x in (("q", q), ("k", k)):
            if bool(x.detach().min() < 0):
                raise ValueError(f"{name} must not be negative (flows are amounts): apply sigmoid or relu first")
    chosen = backends.resolve(backend, q.device, q.dtype)
    accumulate = contract.accumulation_dtype(q)
    if not causal:
        query, key, value = (x.to(accumulate) for x in (q, k, v))
        return _full(query, key, value, query_mask, mask, cu_seqlens, options).to(v.dtype), None
    start = _start(initial_state, q, v, cu_seqlens, accumulate)
    if chosen == "reference":
        query, key, value = (x.to(accumulate) for x in (q, k, v))
        output, last = _each_row(query, key, value, mask, start, cu_seqlens, options)
        return output.to(v.dtype), last if return_state else None

    sums = torch.stack(start[:4], dim=2)
    if chosen == "cpu":
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        allocation, compete, sums, competition = flow_gates_cpu(
            q.contiguous(), k.contiguous(), mask, sums, start.competition, start.seen, offsets, *options
        )
    else:
        allocation, compete, sums, competition = _torch_gates(
            q.to(accumulate), k.to(accumulate), mask, sums, start, cu_seqlens, options
        )
    key, values = k.to(accumulate), compete[..., None] * v.to(accumulate)
    if mask is not None:
        key = key.where(mask[..., None, None], 0)
    output, matrix = linear_attention(
        q.to(accumulate),
        key,
        values,
        initial_state=start.state,
        return_state=True,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=chosen,
    )
    output = (output * allocation[..., None]).to(v.dtype)
    if not return_state:
        return output, None
    assert isinstance(matrix, Tensor)
    key_sum, query_sum, key_flow, query_flow = sums.unbind(2)
    seen = start.seen + _sizes(q, mask, cu_seqlens)
    return output, FlowState(key_sum, query_sum, key_flow, query_flow, competition, seen, matrix)


def _check_mask(name: str, mask: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, True = real; got {getattr(mask, 'dtype', type(mask))}")
    if mask.shape != x.shape[:2] or cu_seqlens is not None:
        raise ValueError(
            f"{name} must be (batch, time) = {tuple(x.shape[:2])}, without cu_seqlens; got {tuple(mask.shape)}"
        )


def _options(causal: bool, eps: float, clip: float | None, temperature: float) -> FlowOptions:
    if not isinstance(eps, int | float) or not eps > 0:
        raise ValueError(f"eps must be a number above 0; got {eps!r}")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"temperature must be a number above 0; got {temperature!r}")
    if clip is None:
        clip = CAUSAL_CLIP if causal else math.inf
    if not clip > 0 or (causal and clip > LARGEST_CLIP):
        raise ValueError(
            f"clip must be above 0, and at most {LARGEST_CLIP:g} in the causal form, whose exponentials are summed as "
            f"they are; got {clip}"
        )
    return FlowOptions(float(eps), float(clip), float(temperature))


def _start(state: FlowState | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> FlowState:
    rows, heads, width, columns = contract.number_of_states(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3]
    if state is None:
        return empty_flow_state(rows, heads, width, columns, q.device, dtype)
    if not isinstance(state, tuple) or len(state) != len(FlowState._fields):
        raise TypeError("initial_state must be a FlowState, as flow_attention returns it")
    state = FlowState(*state)
    for name, leaf in zip(FlowState._fields[:4], state[:4]):
        contract.check_argument(f"initial_state.{name}", leaf, q, (rows, heads, width), "(batch, heads, key width)")
    contract.check_argument("initial_state.competition", state.competition, q, (rows, heads), "(batch, heads)")
    shape = (rows, heads, width, columns)
    contract.check_argument("initial_state.state", state.state, q, shape, "(batch, heads, key width, value width)")
    if tuple(state.seen.shape) != (rows,) or state.seen.is_floating_point():
        raise ValueError(f"initial_state.seen must be integers of shape {(rows,)}")
    return FlowState(*(leaf if name == "seen" else leaf.to(dtype) for name, leaf in state._asdict().items()))


def empty_flow_state(
    batch: int, heads: int, width: int, columns: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> FlowState:
    """The state before any token."""
    key_sum, query_sum, key_flow, query_flow = torch.zeros(4, batch, heads, width, device=device, dtype=dtype)
    seen = torch.zeros(batch, dtype=torch.int64, device=device)
    state = torch.zeros(batch, heads, width, columns, device=device, dtype=dtype)
    return FlowState(key_sum, query_sum, key_flow, query_flow, torch.zeros_like(key_sum[..., 0]), seen, state)


def _sizes(q: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """How many real tokens each row or packed sequence has."""
    if cu_seqlens is not None:
        return packing.locate(cu_seqlens, q.shape[1]).sizes
    return torch.full((q.shape[0],), q.shape[1], device=q.device) if mask is None else mask.sum(1)


def _torch_gates(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    start: FlowState,
    cu_seqlens: Tensor | None,
    options: FlowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens is None:
        return causal_gates(q, k, mask, sums, start.competition, start.seen, options)
    allocation, compete, competition = torch.zeros_like(q[..., 0]), torch.zeros_like(q[..., 0]), start.competition
    for group in packing.by_length(check_offsets(cu_seqlens, q.shape[1]), q.device):
        n, tokens = group.sequences, group.tokens[group.real]
        own = causal_gates(
            packing.take(q, group), packing.take(k, group), group.real, sums[n], competition[n], start.seen[n], options
        )
        at = (torch.zeros_like(tokens), tokens)
        allocation, compete = allocation.index_put(at, own[0][group.real]), compete.index_put(at, own[1][group.real])
        sums, competition = sums.index_put((n,), own[2]), competition.index_put((n,), own[3])
    return allocation, compete, sums, competition


def _full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_mask: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: FlowOptions,
) -> Tensor:
    if cu_seqlens is None:
        query_real, real = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if given is None else given
            for x, given in ((q, query_mask), (k, mask))
        )
        return full_flow_reference(q, k, v, query_real=query_real, real=real, **options._asdict())
    output = torch.zeros_like(v)
    for group in packing.by_length(check_offsets(cu_seqlens, q.shape[1]), q.device):
        pieces = (packing.take(x, group) for x in (q, k, v))
        o = full_flow_reference(*pieces, query_real=group.real, real=group.real, **options._asdict())
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
    return output


def _each_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    start: FlowState,
    cu_seqlens: Tensor | None,
    options: FlowOptions,
) -> tuple[Tensor, FlowState]:
    """The definition on each row's real tokens."""
    if cu_seqlens is None:
        rows = [(b, torch.arange(q.shape[1]) if mask is None else mask[b].nonzero().flatten()) for b in range(len(q))]
    else:
        rows = [(0, torch.arange(a, b)) for a, b in pairwise(check_offsets(cu_seqlens, q.shape[1]))]
    output, states = torch.zeros_like(v), []
    for n, (row, tokens) in enumerate(rows):
        state: tuple[Tensor, ...] = tuple(leaf[n : n + 1] for leaf in start)
        if len(tokens):
            pieces = (x[row : row + 1, tokens] for x in (q, k, v))
            o, state = causal_flow_reference(*pieces, state=state, **options._asdict())
            output = output.index_put((torch.full_like(tokens, row), tokens), o[0])
        states.append(state)
    return output, FlowState(*(torch.cat(leaves) for leaves in zip(*states)))
