"""Pushing feed-forward neurons to exact zero by a penalty that grows slowly (Song et al. 2024, "ProSparse")."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subquad.layers.feedforward_sites import FeedForwardSite, feedforward_sites

from .data import IGNORED, BatchLike
from .objectives import Objective, next_token


class PenaltyStage(NamedTuple):
    """The factor reaches ``peak`` at step ``until``, counted from the start of the run."""

    peak: float
    until: int


class ProgressiveL1:
    """An objective plus ``lambda(step)`` times the L1 norm of every feed-forward layer's hidden values (section 3.2).

    The norm is the sum over neurons and layers, the mean over tokens; tokens whose label is ignored are left out. In
    the first stage lambda is the first peak, from step 1 on. In each later one it goes from the last peak to its own
    along half a sine wave; equal neighbours make a plateau. After the last stage it stays.

    Args:
        stages: at least one, steps rising and peaks not falling. A first peak of 0 trains the exchanged activation
            alone for a while.
        objective: what is minimised beside it.

    Raises:
        ValueError: no stages, a negative or falling peak, or steps that do not rise.

    Example:
        >>> penalty = ProgressiveL1([PenaltyStage(0.0, 10), PenaltyStage(0.2, 20)])
        >>> [round(penalty.factor(step), 3) for step in (10, 15, 20, 30)]
        [0.0, 0.1, 0.2, 0.2]
    """

    def __init__(self, stages: Sequence[PenaltyStage | tuple[float, int]], objective: Objective = next_token) -> None:
        self.stages = tuple(PenaltyStage(*stage) for stage in stages)
        if not self.stages:
            raise ValueError("a penalty needs at least one stage (peak, until)")
        before = PenaltyStage(0.0, 0)
        for stage in self.stages:
            if not stage.peak >= before.peak or not math.isfinite(stage.peak):
                raise ValueError(f"peaks must not be negative and must not fall; {stage.peak} follows {before.peak}")
            if not isinstance(stage.until, int) or stage.until <= before.until:
                raise ValueError(f"stages must end at rising steps; {stage.until!r} follows {before.until}")
            before = stage
        self.objective, self.step = objective, 1

    def begin_step(self, step: int) -> None:
        self.step = step

    def factor(self, step: int) -> float:
        """lambda at a step."""
        start = PenaltyStage(self.stages[0].peak, 0)
        for stage in self.stages:
            if step <= stage.until:
                share = (step - start.until) / (stage.until - start.until)
                return start.peak + (math.sin(math.pi * (share - 0.5)) + 1) / 2 * (stage.peak - start.peak)
            start = stage
        return start.peak

    def __call__(self, model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        with HiddenValues(model) as hidden:
            loss, metrics = self.objective(model, batch)
        real = batch.labels != IGNORED
        weights = real.flatten() / real.sum().clamp(min=1) if real.ndim == 2 else None
        norm, zeros = loss.new_zeros(()), loss.new_zeros(())
        for h in hidden.values:
            by_token = h.abs().sum(-1).flatten().float()
            if weights is None or weights.shape != by_token.shape:
                weights = torch.full_like(by_token, 1 / len(by_token))
            norm = norm + by_token @ weights
            zeros = zeros + (h.detach() == 0).float().mean(-1).flatten() @ weights / len(hidden.values)
        factor = self.factor(self.step)
        return loss + factor * norm, {**metrics, "task loss": loss, "penalty factor": factor, "zeros": zeros}


class HiddenValues:
    """Within the block, ``values`` collects what the last projection of every feed-forward layer reads."""

    def __init__(self, model: nn.Module) -> None:
        self.sites: list[FeedForwardSite] = feedforward_sites(model)
        self.values: list[Tensor] = []

    def __enter__(self) -> "HiddenValues":
        self.values = []
        self._handles = [
            site.down.register_forward_pre_hook(lambda module, inputs: self.values.append(inputs[0]))
            for site in self.sites
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
