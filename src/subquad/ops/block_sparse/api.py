"""The doors to attention over chosen blocks of keys, and to the tree search (Lee et al. 2024) that chooses them."""

from typing import Any

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.block_sparse import chunked
from subquad.kernels.block_sparse.dispatch import block_sparse_cpu
from subquad.kernels.block_sparse.places import Places
from subquad.ops import _contract as contract
from subquad.ops.block_sparse.reference import (
    REPRESENTATIVES,
    block_sparse_attention_reference,
    tree_search_reference,
)

NO_KERNEL = {"gpu": "it has no kernel of its own; 'chunked' runs on any device"}


def hip_mask(
    q: Tensor,
    k: Tensor,
    *,
    budget: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 256,
    query_stride: int = 2,
    representative: str = "center",
    shared: bool = False,
    causal: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The blocks of keys with high scores for every block of queries, found by halving (Lee et al. 2024, section 3).

    The keys before a block's window are cut into ``budget / block_k`` nodes. All nodes are split in two, again and
    again, and the better-scoring half of the parts stays, judged by one block of keys in each, until every node is one
    block: ``O(T log T)`` products in place of ``T^2``. Where all keys fit the budget, all blocks are taken.

    Args:
        q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16; the last T of the S tokens if causal.
        k: ``(B, S, G, K)``, H a multiple of G (grouped heads).
        budget: keys to choose for a block of queries, a multiple of block_k.
        block_q, block_k: queries that share a choice, and keys that are chosen together.
        window: last keys of a query, which are not searched; at least block_q if causal, else 0.
        query_stride: every so many-th query of a block is scored, the last one always.
        representative: the block that speaks for a node: ``center``, ``first`` or ``last``.
        shared: one choice for all query heads of a key head, by the largest score of any.
        causal: whether query t sees the keys up to its own place only.
        mask: ``(B, S)`` bool, True = a real token; real tokens of a row lie together. Blocks of queries and of keys are
            counted from the first real token.
        backend: ``auto``, ``reference``, ``chunked`` or ``cpu``.

    Returns:
        Indices ``(B, H or G, blocks of queries, m)`` int32, ascending, -1 after the last (block i: the real keys from
        ``i block_k`` on); and counts ``(B, H or G, blocks of queries)`` int32.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit, NaN in q; the message says what is
            needed.

    Example: scores rise towards the sixth key and fall after it.
        >>> k = torch.tensor([0.0, 1, 2, 3, 4, 5, 4, 3]).view(1, 8, 1, 1)
        >>> one = torch.ones(1, 1, 1, 1)
        >>> hip_mask(one, k, budget=2, block_q=1, block_k=1, window=0, causal=False)[0].flatten().tolist()
        [4, 5]
    """
    _check_heads(q, k)
    places = _places(q, k, block_q, block_k, window, causal, mask)
    if not isinstance(budget, int) or budget < block_k or budget % block_k:
        raise ValueError(f"budget must be a multiple of block_k {block_k}, at least one; got {budget!r}")
    _check_size("query_stride", query_stride)
    if representative not in REPRESENTATIVES:
        known = ", ".join(map(repr, REPRESENTATIVES))
        raise ValueError(f"representative must be one of {known}; got {representative!r}")
    if contract.values_may_be_read(q) and bool(q.isnan().any()):
        raise ValueError("q holds NaN: no key would be better than any other")
    heads = k.shape[2] if shared else q.shape[2]
    chosen = backends.resolve(backend, q.device, q.dtype, NO_KERNEL)
    with torch.no_grad():
        if chosen == "reference":
            options = (budget, block_k, window, query_stride)
            return _search_blocks(q, k, places, heads, *options, REPRESENTATIVES[representative])
        search = chunked.search
        if chosen == "cpu":
            from subquad.kernels.block_sparse.cpu_search import search
        wide = contract.accumulation_dtype(q)
        return search(q.to(wide), k.to(wide), places, heads, budget, block_k, window, query_stride, representative)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 256,
    sinks: int = 16,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
    return_log_sum_exp: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, None] | tuple[Tensor, None, Tensor]:
    """``softmax(scale * q k^T) v`` over the first keys, the last keys and chosen blocks, each key once.

    Query t sees the real keys ``0..sinks - 1``, those of the blocks chosen for its block of queries, and its own last
    ``window``, as far as they are not after it. The choice is a constant: gradients flow through the attention.

    Args:
        q, k, v: ``(B, T, H, K)``, ``(B, S, G, K)``, ``(B, S, G, V)``, as for :func:`hip_mask`.
        indices, counts: ``(B, H or G, blocks of queries, m)`` and without m, integers, as from :func:`hip_mask`.
        block_q, block_k, window, causal, mask: those of the choice; window at least 1 if causal.
        sinks: first real keys that every query sees.
        scale: of the scores; None is ``K**-0.5``.
        return_log_sum_exp: also return ``(B, T, H)`` log-sum-exps, float32, by which results over disjoint keys merge.
        backend: ``auto``, ``reference``, ``chunked`` or ``cpu``.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype (zero for padded queries), None, and the log-sum-exp if asked for.

    Raises:
        ValueError, TypeError: a shape, dtype or range that does not fit; the message says what is needed.

    Example:
        >>> q = k = torch.zeros(1, 4, 1, 1)
        >>> v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
        >>> none = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
        >>> options = {"block_q": 1, "block_k": 1, "window": 1, "sinks": 1}
        >>> block_sparse_attention(q, k, v, none, none[..., 0], **options)[0].flatten().tolist()
        [1.0, 1.5, 2.5, 4.5]
    """
    contract.check_tensor("v", v, 4, "(batch, keys, key heads, value width)")
    contract.check_same_kind("v", v, q)
    _check_heads(q, k)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v must share batch, keys and heads; got {tuple(k.shape)} and {tuple(v.shape)}")
    contract.check_not_empty("v", v)
    contract.check_scale(scale)
    places = _places(q, k, block_q, block_k, window, causal, mask)
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks must be an integer >= 0; got {sinks!r}")
    _check_choice(indices, counts, q, k, places, block_k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = backends.resolve(backend, q.device, q.dtype, NO_KERNEL)
    wide = [x.to(contract.accumulation_dtype(q)) for x in (q, k, v)]
    if chosen == "reference":
        visible = _visible(indices, counts, q, k, places, block_k, window, sinks)
        output, mass = block_sparse_attention_reference(wide[0], wide[1], wide[2], visible, scale=scale)
    else:
        choice = (indices, counts, places.starts, places.ends)
        sizes: tuple[Any, ...] = (block_q, block_k, window, sinks, causal, scale)
        attend: Any = block_sparse_cpu if chosen == "cpu" else chunked.attend
        output, mass = attend(*wide, *choice, *sizes)
    return (output.to(v.dtype), None, mass) if return_log_sum_exp else (output.to(v.dtype), None)


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 256,
    sinks: int = 16,
    query_stride: int = 2,
    representative: str = "center",
    shared: bool = False,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, None]:
    """:func:`block_sparse_attention` over the blocks of :func:`hip_mask`, whose arguments, results and errors it has.

    Where all keys fit the budget it is softmax attention.

    Example:
        >>> x = torch.zeros(1, 3, 1, 2)
        >>> v = torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1, 1)
        >>> hip_attention(x, x, v, block_q=1, window=1)[0].flatten().tolist()
        [2.0, 3.0, 5.0]
    """
    indices, counts = hip_mask(
        q,
        k,
        budget=budget,
        block_q=block_q,
        block_k=block_k,
        window=window,
        query_stride=query_stride,
        representative=representative,
        shared=shared,
        causal=causal,
        mask=mask,
        backend=backend,
    )
    output, _, *_ = block_sparse_attention(
        q,
        k,
        v,
        indices,
        counts,
        block_q=block_q,
        block_k=block_k,
        window=window,
        sinks=sinks,
        causal=causal,
        scale=scale,
        mask=mask,
        backend=backend,
    )
    return output, None


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {size!r}")


def _check_heads(q: Tensor, k: Tensor) -> None:
    contract.check_tensor("q", q, 4, "(batch, queries, heads, key width)")
    contract.check_tensor("k", k, 4, "(batch, keys, key heads, key width)")
    contract.check_same_kind("k", k, q)
    for name, x in (("q", q), ("k", k)):
        contract.check_not_empty(name, x)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q (B, T, H, K) and k (B, S, G, K) must agree, H a multiple of G; got {tuple(q.shape)}, {tuple(k.shape)}"
        )


def _places(q: Tensor, k: Tensor, block_q: int, block_k: int, window: int, causal: bool, mask: Tensor | None) -> Places:
    _check_size("block_q", block_q)
    _check_size("block_k", block_k)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer; got {window!r}")
    if causal and window < block_q:
        raise ValueError(
            f"window must be at least block_q {block_q}, so that every query of a block sees itself; got {window}"
        )
    if not causal and window:
        raise ValueError(
            f"window belongs to causal=True: without it all keys are searched; give window=0, got {window}"
        )
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"causal queries are the last tokens: {q.shape[1]} queries need as many keys; got {k.shape[1]}"
        )
    batch, keys = k.shape[:2]
    if mask is None:
        starts = torch.zeros(batch, dtype=torch.int64, device=q.device)
        ends = torch.full_like(starts, keys)
    else:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor, True = a real token; got {getattr(mask, 'dtype', type(mask))}"
            )
        if mask.shape != k.shape[:2] or mask.device != q.device:
            raise ValueError(
                f"mask must be (batch, keys) = {tuple(k.shape[:2])} on {q.device}; got {tuple(mask.shape)}"
            )
        number = mask.sum(1)
        starts = mask.int().argmax(1).to(torch.int64)
        ends = starts + number
        steps = torch.arange(keys, device=q.device)
        together = (steps >= starts[:, None]) & (steps < ends[:, None])
        if contract.values_may_be_read(q) and bool((together != mask).any()):
            raise ValueError("the real tokens of a row must lie together: mask has padding between them")
    return Places.of(q.shape[1], keys, starts, ends, block_q, causal)


def _check_choice(indices: Tensor, counts: Tensor, q: Tensor, k: Tensor, places: Places, block_k: int) -> None:
    for name, x in (("indices", indices), ("counts", counts)):
        if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor; got {getattr(x, 'dtype', type(x).__name__)}")
        if x.device != q.device:
            raise TypeError(f"{name} must be on q's device {q.device}; it is on {x.device}")
    heads = indices.shape[1] if indices.ndim == 4 else 0
    shape = (q.shape[0], heads, places.blocks)
    if heads not in (q.shape[2], k.shape[2]) or indices.shape[:3] != shape or tuple(counts.shape) != shape:
        raise ValueError(
            f"indices and counts must be (batch, heads or key heads, blocks of queries, m) and without m: "
            f"({q.shape[0]}, {q.shape[2]} or {k.shape[2]}, {places.blocks}, m); "
            f"got {tuple(indices.shape)} and {tuple(counts.shape)}"
        )
    if contract.values_may_be_read(q):
        used = torch.arange(indices.shape[3], device=q.device) < counts[..., None]
        if bool((counts < 0).any()) or bool((counts > indices.shape[3]).any()):
            raise ValueError(f"counts must lie in [0, {indices.shape[3]}], the number of slots in indices")
        before = torch.nn.functional.pad(indices[..., :-1], (1, 0), value=-1)
        if bool((used & (indices <= before)).any()):
            raise ValueError("indices must ascend from 0 on: a block given twice would be counted twice")


def _search_blocks(
    q: Tensor,
    k: Tensor,
    places: Places,
    heads: int,
    budget: int,
    block_k: int,
    window: int,
    query_stride: int,
    representative: Any,
) -> tuple[Tensor, Tensor]:
    """The definition, one block of queries after another."""
    slots = places.slots(budget, block_k, window)
    indices = torch.full((len(q), heads, places.blocks, slots), -1, dtype=torch.int32, device=q.device)
    counts = torch.zeros(indices.shape[:3], dtype=torch.int32, device=q.device)
    columns, exists, place = places.queries_of_blocks()
    group = q.shape[2] // heads
    for row, start in enumerate(places.starts.tolist()):
        for block in range(places.blocks):
            own = columns[row, block][exists[row, block]].flip(0)[::query_stride]
            span = int(place[row, block].max()) + 1 - window
            if not len(own) or span <= 0:
                continue
            for head in range(heads):
                queries = q[row, own, head * group : (head + 1) * group].flatten(0, 1)
                keys = k[row, start : start + span, head * k.shape[2] // heads]
                found = tree_search_reference(
                    queries, keys, most=budget // block_k, block_k=block_k, representative=representative
                )
                indices[row, head, block, : len(found)] = torch.tensor(found, dtype=torch.int32)
                counts[row, head, block] = len(found)
    return indices, counts


def _visible(
    indices: Tensor, counts: Tensor, q: Tensor, k: Tensor, places: Places, block_k: int, window: int, sinks: int
) -> Tensor:
    """``(B, H, T, S)`` bool: the definition of who sees whom."""
    batch, heads, blocks, slots = indices.shape
    keys = k.shape[1]
    column = torch.arange(keys, device=q.device)
    key = column - places.starts[:, None]  # places among real tokens
    real = (key >= 0) & (column < places.ends[:, None])
    used = torch.arange(slots, device=q.device) < counts[..., None]
    block_of_key = torch.where(real, key // block_k, -1)
    chosen = ((indices[..., None] == block_of_key[:, None, None, None]) & used[..., None]).any(
        3
    )  # (B, heads, blocks, S)
    columns, exists, place = places.queries_of_blocks()
    visible = torch.zeros(batch, heads, q.shape[1], keys, dtype=torch.bool, device=q.device)
    for row in range(batch):
        own = columns[row][exists[row]]
        at = place[row][exists[row]][:, None]
        block = torch.arange(blocks, device=q.device)[:, None].expand(-1, places.block_q)[exists[row]]
        seen = chosen[row][:, block] | (key[row] < sinks)
        if places.causal:
            seen = (seen | (key[row] > at - window)) & (key[row] <= at)
        visible[row, :, own] = seen & real[row]
    return visible.repeat_interleave(q.shape[2] // heads, 1)
