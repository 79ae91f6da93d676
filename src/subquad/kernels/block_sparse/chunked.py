"""Tree search for blocks of keys, and attention over them, in plain torch: any device, float64, any derivative.

Blocks of queries are taken in slabs, so that gathered keys stay small; what a slab needs for its gradient is computed
anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.kernels.block_sparse.places import Places

SLAB_BYTES = 2**26  # of gathered keys, or of their scores
OFFSETS: dict[str, Callable[[Tensor], Tensor]] = {
    "center": lambda size: size // 2,
    "first": torch.zeros_like,
    "last": lambda size: size - 1,
}


def search(
    q: Tensor,
    k: Tensor,
    places: Places,
    index_heads: int,
    budget: int,
    block_k: int,
    window: int,
    query_stride: int,
    representative: str,
) -> tuple[Tensor, Tensor]:
    """The chosen blocks ``(B, index_heads, blocks, m)``, ascending, -1 after the last, and how many there are."""
    most, slots = budget // block_k, places.slots(budget, block_k, window)
    columns, exists, place = places.queries_of_blocks()
    steps = torch.arange(places.block_q, device=q.device)
    last = steps.where(exists, -1).amax(-1, keepdim=True)
    scored = exists & ((last - steps) % query_stride == 0)
    totals = (place.amax(-1) + 1 - window).clamp(min=0)  # keys to choose from, (B, blocks)
    offset = OFFSETS[representative]
    found = []
    for part in _slabs(places, q, index_heads, 2 * most * block_k):
        queries = _take_queries(q, columns[:, part], index_heads).flatten(3, 4)
        rows = scored[:, part].repeat(1, 1, q.shape[2] // index_heads)
        found.append(_search(queries, rows, k, places.starts, totals[:, part], most, slots, block_k, offset))
    indices, counts = (torch.cat(parts, dim=2) for parts in zip(*found))
    return indices, counts


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    starts: Tensor,
    ends: Tensor,
    block_q: int,
    block_k: int,
    window: int,
    sinks: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, T, H, V)`` and log-sum-exps ``(B, T, H)``; zero and -inf where nothing is seen."""
    places = Places.of(q.shape[1], k.shape[1], starts, ends, block_q, causal)
    columns, exists, place = places.queries_of_blocks()
    heads = indices.shape[1]
    near = window + block_q - 1 if causal else 0
    outputs, masses = [], []
    for part in _slabs(places, q, heads, sinks + indices.shape[3] * block_k + near):
        arguments = (q, k, v, indices[:, :, part], counts[:, :, part], columns[:, part], place[:, part], places)
        output, mass = checkpoint(_attend, *arguments, block_k, window, sinks, scale, use_reentrant=False)
        outputs.append(output)
        masses.append(mass)
    # (B, heads, blocks, group, block_q, ...) -> the order of queries
    order = torch.full((q.shape[0], q.shape[1]), -1, device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None].expand_as(columns)
    slots = torch.arange(places.blocks * block_q, device=q.device).unflatten(0, (-1, block_q)).expand_as(columns)
    order[rows[exists], columns[exists]] = slots[exists]
    there = (order >= 0)[:, :, None]

    def in_order(parts: list[Tensor]) -> Tensor:
        x = torch.cat(parts, 2).movedim(3, 2).flatten(1, 2).flatten(2, 3)  # (B, H, blocks * block_q, ...)
        at = order.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, at).transpose(1, 2)

    output = in_order(outputs)
    log_sum_exp = in_order([mass[..., None] for mass in masses])[..., 0]
    return output.where(there[..., None], 0), log_sum_exp.where(there, -torch.inf)


def _slabs(places: Places, q: Tensor, heads: int, keys: int) -> list[slice]:
    """Parts of the blocks, each with about ``SLAB_BYTES`` of gathered keys or of scores."""
    largest = max(q.shape[3], q.shape[2] // heads * places.block_q)
    width = max(1, SLAB_BYTES // (q.shape[0] * heads * keys * largest * q.element_size()))
    return [slice(low, min(low + width, places.blocks)) for low in range(0, places.blocks, width)]


def _take_queries(q: Tensor, columns: Tensor, heads: int) -> Tensor:
    """``(B, heads, blocks, group, block_q, K)``; where no query exists, another's."""
    at = columns.clamp(0, q.shape[1] - 1).flatten(1)[:, :, None, None].expand(-1, -1, *q.shape[2:])
    return q.gather(1, at).unflatten(1, columns.shape[1:]).unflatten(3, (heads, -1)).permute(0, 3, 1, 4, 2, 5)


def _take_keys(k: Tensor, keys: Tensor, starts: Tensor) -> Tensor:
    """Rows of ``k (B, S, G, K)`` at places ``(B, heads, blocks, n)`` -> ``(B, heads, blocks, n, K)``."""
    heads = keys.shape[1]
    column = (keys + starts[:, None, None, None]).clamp(0, k.shape[1] - 1).to(torch.int64)
    row = torch.arange(len(k), device=k.device)[:, None, None, None]
    head = torch.arange(heads, device=k.device)[:, None, None] * k.shape[2] // heads
    return k[row, column, head]


def _search(
    queries: Tensor,
    scored: Tensor,
    k: Tensor,
    starts: Tensor,
    totals: Tensor,
    most: int,
    slots: int,
    block_k: int,
    offset: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Of ``queries (B, heads, blocks, n, K)`` those ``scored (B, blocks, n)`` count; ``totals (B, blocks)`` keys."""
    heads = queries.shape[1]
    blocks = (totals + block_k - 1) // block_k
    all_of_them = blocks <= most
    steps = torch.arange(most, device=k.device)
    bounds = blocks[..., None] * torch.arange(most + 1, device=k.device) // most
    node = bounds[..., :-1][:, None].expand(-1, heads, -1, -1)
    size = bounds.diff(dim=-1).where(~all_of_them[..., None], 1)[:, None].expand_as(node)
    inside = torch.arange(block_k, device=k.device)
    while int(size.max()) > 1:
        half = size // 2
        child = torch.stack([node, node + half], -1).flatten(-2)
        child_size = torch.stack([half, size - half], -1).flatten(-2)
        keys = ((child + offset(child_size)) * block_k)[..., None] + inside
        seen = (keys < totals[:, None, :, None, None]) & (child_size > 0)[..., None]
        scores = queries @ _take_keys(k, keys.flatten(-2), starts).mT
        scores = scores.masked_fill(~scored[:, None, :, :, None], -torch.inf).amax(-2)
        best = scores.unflatten(-1, (-1, block_k)).masked_fill(~seen, -torch.inf).amax(-1)
        # nodes of no size last of all; of equal scores the earlier
        best = best.clamp(min=torch.finfo(best.dtype).min).masked_fill(child_size == 0, -torch.inf)
        order = torch.sort(best, dim=-1, descending=True, stable=True).indices
        kept = order[..., :most].sort(dim=-1).values
        node, size = child.gather(-1, kept), child_size.gather(-1, kept)
    node = steps.where(all_of_them[:, None, :, None], node)
    counts = blocks.clamp(max=most)[:, None].expand(-1, heads, -1)
    indices = node.where(steps < counts[..., None], -1)[..., :slots]
    return indices.to(torch.int32), counts.to(torch.int32)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    columns: Tensor,
    place: Tensor,
    places: Places,
    block_k: int,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(B, heads, blocks, group, block_q, V)`` and the log-sum-exps of a slab of blocks."""
    heads = indices.shape[1]
    exists = place >= 0
    lengths = places.ends - places.starts
    limit = torch.minimum(place.amax(-1) + 1, lengths[:, None])[:, None, :, None]
    first = place.where(exists, places.keys).amin(-1)
    edge = (first + 1 - window).clamp(min=0) if places.causal else lengths[:, None].expand_as(first)
    edge = edge[:, None, :, None]
    slot = torch.arange(indices.shape[3], device=k.device)
    given = (slot < counts[..., None])[..., None].expand(-1, -1, -1, -1, block_k).flatten(-2)
    chosen = (indices[..., None].to(torch.int64) * block_k + torch.arange(block_k, device=k.device)).flatten(-2)
    given = given & (chosen < limit)
    sink = torch.arange(sinks, device=k.device).expand(*indices.shape[:3], -1)
    far = torch.cat([sink, chosen], -1)
    far_seen = torch.cat([sink < limit, given & (chosen >= sinks)], -1) & (far < edge)
    width = window + places.block_q - 1 if places.causal else 0
    near = (edge + torch.arange(width, device=k.device)).expand(-1, heads, -1, -1)
    at = (chosen - edge).where(given & (chosen >= edge), width).clamp(0, width)
    picked = torch.zeros(*near.shape[:3], width + 1, dtype=torch.bool, device=k.device)
    picked = picked.scatter(-1, at, True)[..., :-1] | (near < sinks)
    query = place[:, None, :, :, None]
    near_seen = (near < limit)[..., None, :] & (near[..., None, :] <= query)
    near_seen = near_seen & ((near[..., None, :] > query - window) | picked[..., None, :])
    seen = torch.cat([far_seen[..., None, :].expand(-1, -1, -1, places.block_q, -1), near_seen], -1)
    seen = (seen & exists[:, None, :, :, None])[:, :, :, None]
    keys = torch.cat([far, near], -1)
    queries = _take_queries(q, columns, heads)
    scores = queries @ _take_keys(k, keys, places.starts).mT[:, :, :, None] * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    mass = scores.logsumexp(-1)
    weights = (scores - mass.where(mass != -torch.inf, 0)[..., None]).exp()
    return weights @ _take_keys(v, keys, places.starts)[:, :, :, None], mass
