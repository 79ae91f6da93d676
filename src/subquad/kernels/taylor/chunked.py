"""Causal Taylor attention in chunks of plain matrix products: any device, float64, differentiable any number of times.

Inside a chunk the weights are the polynomial itself, and older tokens are read from the state. Features exist for one
segment of chunks at a time; where gradients are wanted, autograd keeps those of all.
"""

import torch
from torch import Tensor

from subquad.kernels import packing
from subquad.kernels.taylor.features import SEGMENT, taylor_features


def taylor_attention(
    q: Tensor, k: Tensor, values: Tensor, initial_state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """``sum_{j <= t} (1 + s + s^2 / 2) values_j``, ``s = scale q_t . k_j``, added to what the state holds.

    Args:
        q, k: ``(B, T, H, d)``, float32 or float64 like all others.
        values: ``(B, T, H, V)``.
        initial_state: ``(B, H, F, V)``.

    Returns:
        ``(B, T, H, V)`` and the last state.
    """
    state, outputs = initial_state, []
    segment = max(SEGMENT // chunk_size, 1) * chunk_size
    for query, key, value in zip(*(x.split(segment, 1) for x in (q, k, values))):
        output, state = _segment(query, key, value, state, scale, min(chunk_size, query.shape[1]))
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def _segment(q: Tensor, k: Tensor, values: Tensor, state: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    time = q.shape[1]

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, .) -> (B, H, N, C, .)
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -time % chunk))
        return padded.unflatten(1, (-1, chunk)).movedim(3, 1)

    query, key, value = chunks(q), chunks(k), chunks(values)  # a padded value is zero, its one included
    score = scale * query @ key.mT
    weights = (1 + score + score.square() / 2).tril()
    added = taylor_features(key, scale).mT @ value
    before = state[:, :, None] + torch.cat([torch.zeros_like(added[:, :, :1]), added[:, :, :-1].cumsum(2)], dim=2)
    output = weights @ value + taylor_features(query, scale) @ before
    return output.movedim(1, 3).flatten(1, 2)[:, :time], before[:, :, -1] + added[:, :, -1]


def packed_taylor_attention(
    q: Tensor, k: Tensor, values: Tensor, initial_state: Tensor, cu_seqlens: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The same for packed sequences in a batch of one; states are ``(N, H, F, V)``."""
    output, states = torch.zeros_like(values), initial_state
    for group in packing.by_length(cu_seqlens.tolist(), q.device):
        pieces = (packing.take(x, group) for x in (q, k, values))
        o, last = taylor_attention(*pieces, initial_state[group.sequences], scale, chunk_size)
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
        states = states.index_put((group.sequences,), last)
    return output, states
