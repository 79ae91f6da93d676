"""Attention over chosen blocks of keys as defined, and the tree search that chooses them, one block after another.

Source: Lee et al. 2024, "HiP attention: sparse sub-quadratic attention with hierarchical attention pruning", section 3.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Representative = Callable[[int, int], list[int]]  # first block and size of a node -> the blocks that stand for it
REPRESENTATIVES: dict[str, Representative] = {
    "center": lambda first, size: [first + size // 2],
    "first": lambda first, size: [first],
    "last": lambda first, size: [first + size - 1],
}


def tree_search_reference(
    queries: Tensor, keys: Tensor, *, most: int, block_k: int, representative: Representative
) -> list[int]:
    """The blocks of ``keys (S, K)`` that a block of ``queries (n, K)`` goes to, ascending, at most ``most``.

    The S keys are n blocks. Nodes ``[n i / m, n (i + 1) / m)`` are halved until each is one block; of the children the
    m with the largest product of any query with any key of the blocks that stand for them are kept, of equals the
    earlier.
    """
    total = -(-len(keys) // block_k)
    if total <= most:
        return list(range(total))
    bounds = [total * i // most for i in range(most + 1)]
    nodes = [(a, b - a) for a, b in pairwise(bounds)]
    while max(size for _, size in nodes) > 1:
        children = [
            child
            for first, size in nodes
            for child in ((first, size // 2), (first + size // 2, size - size // 2))
            if child[1] > 0
        ]
        scores = []
        for child in children:
            blocks = representative(*child)
            own = torch.cat([keys[block * block_k : (block + 1) * block_k] for block in blocks])
            scores.append(float((queries @ own.T).max()))
        best = sorted(range(len(children)), key=lambda i: (-scores[i], i))[:most]
        nodes = [children[i] for i in sorted(best)]
    return [first for first, _ in nodes]


def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over what ``visible (B, H, T, S)`` shows; a query that sees nothing reads zero.

    ``k, v (B, S, G, .)`` with G dividing H. Returns ``(B, T, H, V)`` and the log-sum-exps ``(B, T, H)``.
    """
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = scale * torch.einsum("bthk,bshk->bhts", q, k)
    mass = scores.masked_fill(~visible, -torch.inf).logsumexp(-1, keepdim=True)
    weights = (scores - mass.where(mass != -torch.inf, 0)).exp().where(visible, 0)
    return torch.einsum("bhts,bshv->bthv", weights, v), mass[..., 0].transpose(1, 2)
