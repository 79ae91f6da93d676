"""What can be read off a linear time-varying system: its spectrum, how far it remembers, what it can tell apart.

The systems are those of :mod:`subquad.ops.dynamics` (Sieber et al. 2024, "Understanding the differences in Foundation
Models"). All functions are exact up to float64.
"""

import math

import torch
from torch import Tensor

from subquad.ops.dynamics import RecurrentSystem, System

SAMPLED = 16  # tokens at which a transition that is not diagonal is taken apart


def eigenvalues(system: RecurrentSystem, tokens: int = SAMPLED) -> Tensor:
    """Eigenvalues of L at so many tokens, evenly spread, ``(B, tokens, H, 1 or K)``; complex unless diagonal."""
    time = system.read.shape[1]
    places = torch.linspace(0, time - 1, min(tokens, time)).round().to(torch.int64)
    if system.erase is None:
        return system.decay[:, places]
    return torch.stack([torch.linalg.eigvals(system.matrices(int(t))) for t in places], dim=1)


def half_lives(system: RecurrentSystem) -> Tensor:
    """Tokens in which a mode of the state falls to a half, ``(H, K or 1)``, slowest last; inf: it stays, nan: no trend.

    By the mean of ``log |eigenvalue|`` over sequences and tokens: of channels where L is diagonal, of eigenvalues in
    their order of size where it is not. The first token is left out: what it forgets is empty.

    Example: a constant decay of one half.
        >>> from subquad.ops.dynamics import matrix_system
        >>> x = torch.ones(1, 4, 1, 2, dtype=torch.float64)
        >>> half_lives(matrix_system("gla", x, x, x, scale=1.0, log_decay=(0.5 * x).log())).tolist()
        [[1.0, 1.0]]
    """
    if system.erase is None:
        log = _log_size(system.decay[:, 1:]).mean(dim=(0, 1))
    else:
        log = _log_size(eigenvalues(system)[:, 1:]).sort(dim=-1).values.mean(dim=(0, 1))
    lives = torch.where(log < -1e-12, math.log(0.5) / log, torch.inf)
    return lives.sort(dim=-1).values


def coupling(system: RecurrentSystem) -> Tensor:
    """Correlation over tokens of ``log |L_t|`` with ``log |B_t|``, ``(H,)``: -1 where a token that writes more makes
    the state forget more, 0 where the two are free or either is constant. The first token is left out.
    """
    forget = _log_size(system.decay[:, 1:]).mean(-1)
    write = _log_size(system.write[:, 1:].square().sum(dim=(2, 4)).sqrt())
    forget, write = (x.flatten(0, 1) for x in (forget, write))
    forget, write = forget - forget.mean(0), write - write.mean(0)
    scale = forget.square().sum(0).sqrt() * write.square().sum(0).sqrt()
    product = (forget * write).sum(0)
    return torch.where(scale > 1e-12, product / scale.clamp(min=1e-12), 0.0)


def _log_size(x: Tensor) -> Tensor:
    return x.abs().clamp(min=torch.finfo(torch.float64).tiny).log()


def memory_rank(weights: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Numbers about the first half of the tokens that reach the second half, ``(B, H)`` int64.

    The rank of the block of ``weights (B, H, T, T n)`` that leads from one to the other, up to ``tolerance`` of its
    largest singular value: at most K for a state of K rows, up to T/2 where every token is kept.
    """
    rows, columns = weights.shape[-2] // 2, weights.shape[-1] // 2
    block = weights[..., rows:, :columns]
    if 0 in block.shape:
        return torch.zeros(weights.shape[:2], dtype=torch.int64)
    values = torch.linalg.svdvals(block)
    return (values > tolerance * values[..., :1]).sum(-1)


def reach(weights: Tensor, share: float = 0.95) -> Tensor:
    """Tokens back that hold ``share`` of a token's ``|a_ij|``, mean over the second half of the tokens, ``(B, H)``.

    Example: each token reads itself and the one before alike.
        >>> a = torch.eye(8) + torch.eye(8).roll(-1, 1).tril()
        >>> reach(a[None, None]).item()
        1.0
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    time = weights.shape[-2]
    size = weights.abs().unflatten(-1, (time, -1)).sum(-1)
    place = torch.arange(time, device=weights.device)
    back = place[:, None] - place
    by_distance = size.gather(-1, back.clamp(min=0).expand_as(size)).where(back >= 0, 0)
    total = by_distance.sum(-1, keepdim=True)
    distance = (by_distance.cumsum(-1) < (share - 1e-12) * total).sum(-1)
    return distance[..., time // 2 :].double().mean(-1)


def mean_weight_by_distance(weights: Tensor) -> Tensor:
    """Mean of ``|a_ij|`` over the tokens i that have a j so many tokens back, ``(H, T)``."""
    time = weights.shape[-2]
    size = weights.abs().unflatten(-1, (time, -1)).sum(-1).mean(0)
    return torch.stack([size.diagonal(-distance, dim1=-2, dim2=-1).mean(-1) for distance in range(time)], dim=-1)


def distance(a: System, b: System) -> float:
    """Relative Frobenius distance ``|a - b| / |a|`` of the unrolled weights of two systems on inputs of one length.

    Raises:
        ValueError: weights of different shapes.
    """
    first, second = a.weights(), b.weights()
    if first.shape != second.shape:
        raise ValueError(
            "systems can be compared on as many sequences, heads and tokens; "
            f"their weights are {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return float((first - second).norm() / first.norm())


def linearized(mixer: torch.nn.Module, x: Tensor) -> Tensor:
    """How strongly output i of any mixer moves with input j, ``(T, T)``: the norm of its Jacobian at ``x (1, T, D)``.

    For mixers that are no linear system (their gates read their own state); it holds near x only.
    """
    if x.ndim != 3 or x.shape[0] != 1:
        raise ValueError(f"a linearisation is taken at one sequence (1, time, width); got {tuple(x.shape)}")
    jacobian = torch.autograd.functional.jacobian(lambda inputs: mixer(inputs).output, x)
    return jacobian[0, :, :, 0].norm(dim=(1, 3))  # type: ignore[no-any-return]
