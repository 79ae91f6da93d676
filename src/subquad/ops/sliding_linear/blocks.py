"""The window forms in blocks of the window's size, for whole sequences: two score tiles a block, and a running sum.

A block of queries meets the keys of its own block and of the one before; all older blocks are in the sum
``sum phi(k) [v, 1]^T``. In the sliding form part of the block before has left the window, and is read by features from
the tile. ``O(T (w (K + V + F) + F V))``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def block_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor,
    window: int,
    terraced: bool,
    scale: float,
) -> Tensor:
    """q, phi_q ``(B, T, H, .)``, k, v ``(B, T, G, .)``, phi_k ``(B, T, P, F)``, from position 0 -> ``(B, T, H, V)``."""
    time, heads = q.shape[1], q.shape[2]
    count = -(-time // window)

    def in_blocks(x: Tensor) -> Tensor:
        """``(B, H, n, w, .)``, heads repeated."""
        x = F.pad(x, (0, 0, 0, 0, 0, count * window - time)).unflatten(1, (count, window)).movedim(3, 1)
        return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x

    q, k, phi_q = in_blocks(q), in_blocks(k), in_blocks(phi_q)
    v = in_blocks(torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))  # the last column is the denominator's
    scores = scale * q @ _with_previous(k).mT
    distance = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    near = distance >= 0 if terraced else (distance >= 0) & (distance < window)
    exists = torch.ones(count, 1, 2 * window, dtype=torch.bool, device=q.device)
    exists[0, :, :window] = False
    scores = scores.masked_fill(~(near & exists), -torch.inf)
    softmax = mix[:, None, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    total = softmax @ _with_previous(v)
    if count > 1 and not terraced:
        phi_p, v_p = in_blocks(phi_k)[:, :, :-1], v[:, :, :-1]
        left = torch.ones(window, window, dtype=torch.bool, device=q.device).tril()  # one window away or more
        tile = (phi_q[:, :, 1:] @ phi_p.mT).masked_fill(~left, 0)
        total = total + F.pad(tile @ v_p, (0, 0, 0, 0, 1, 0))
    if count > 2:
        total = total + F.pad(_before_previous(phi_q, phi_k, v, window), (0, 0, 0, 0, 2, 0))
    output = total[..., :-1] / total[..., -1:]
    return output.movedim(1, 3).flatten(1, 2)[:, :time]


def _with_previous(x: Tensor) -> Tensor:
    """Each block behind the one before it: ``(B, H, n, 2 w, .)``."""
    return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3)


def _before_previous(phi_q: Tensor, phi_k: Tensor, v: Tensor, window: int) -> Tensor:
    """What queries of blocks 2, 3, ... read from the sum over all but the last two blocks; P may be less than H."""
    heads, groups, count = phi_q.shape[1], phi_k.shape[2], phi_q.shape[2]
    older = phi_k[:, : (count - 2) * window].unflatten(1, (count - 2, window)).movedim(3, 1)  # (B, P, n, w, F)
    if groups != heads and v.shape[1] == heads:
        v = v[:, :: heads // groups]  # a map of a group serves one head of values
    sums = (older.mT @ v[:, :, :-2]).cumsum(2)
    read = phi_q[:, :, 2:].unflatten(1, (groups, heads // groups))
    return (read @ sums[:, :, None]).flatten(1, 2)
