"""Recurrent networks that are no sequence models: the associative memory of Hopfield 1982."""

import torch
from torch import Tensor, nn


class Hopfield(nn.Module):
    """N units of -1 or 1 with symmetric weights, whose energy has stored patterns as its valleys.

    ``W = (1/N) sum_p xi_p xi_p^T`` with a zero diagonal; a unit becomes the sign of ``sum_j W_ij s_j + b_i``, and keeps
    its state where that is 0. Units change one after another, so that the energy never rises; all at once could
    oscillate.
    About 0.138 N random patterns can be told apart.

    Args:
        units: N.

    Example:
        >>> memory = Hopfield(4)
        >>> memory.store(torch.tensor([[1.0, 1.0, -1.0, -1.0]]))
        >>> memory.recall(torch.tensor([[1.0, 1.0, -1.0, 1.0]])).tolist()
        [[1.0, 1.0, -1.0, -1.0]]
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        if units < 1:
            raise ValueError(f"units must be at least 1; got {units}")
        self.units = units
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(units, units))
        self.register_buffer("bias", torch.zeros(units))

    @torch.no_grad()
    def store(self, patterns: Tensor) -> None:
        """Adds patterns ``(P, N)`` of -1 and 1 to what is stored."""
        self._check("patterns", patterns)
        patterns = patterns.to(self.weight.dtype)
        self.weight += patterns.T @ patterns / self.units
        self.weight.fill_diagonal_(0.0)

    @torch.no_grad()
    def recall(self, states: Tensor, *, sweeps: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """The valley that each state ``(B, N)`` falls into: units in random order, until a sweep changes none.

        Args:
            states: of -1 and 1.
            sweeps: at most so many passes over all units.
            generator: of the order.
        """
        self._check("states", states)
        states = states.to(self.weight.dtype).clone()
        for _ in range(sweeps):
            before = states.clone()
            for unit in torch.randperm(self.units, generator=generator).tolist():
                field = states @ self.weight[unit] + self.bias[unit]
                states[:, unit] = torch.where(field == 0, states[:, unit], field.sign())
            if torch.equal(before, states):
                break
        return states

    def energy(self, states: Tensor) -> Tensor:
        """``-1/2 s W s - b s`` of each state: ``(B, N)`` -> ``(B,)``."""
        self._check("states", states)
        states = states.to(self.weight.dtype)
        return -0.5 * ((states @ self.weight) * states).sum(-1) - states @ self.bias

    def _check(self, name: str, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.units:
            raise ValueError(f"{name} must be (rows, {self.units}); got {tuple(x.shape)}")
        if not bool((x.abs() == 1).all()):
            raise ValueError(f"{name} must hold -1 and 1 only")
