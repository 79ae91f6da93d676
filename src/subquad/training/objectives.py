"""Objectives: from a model and a batch to a mean loss and named metrics."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import IGNORED, BatchLike


class Objective(Protocol):
    """What the loop minimises."""

    def __call__(self, model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The scalar mean loss over the batch's targets (with its graph), and scalar means to record beside it."""
        ...


def next_token(model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Mean cross-entropy of the labels, in nats, over the labels that are not -100; zero where none is left.

    Labels are already aligned, ``labels[b, t]`` is the target of position t, so that next-token prediction, masked
    tokens and sequence tasks are one objective. A model with ``loss_from_labels(inputs, labels)`` computes its own loss
    (in chunks of a large vocabulary, with its auxiliary losses added); any other is called as
    ``model(input_ids=inputs).logits``, ``(B, T, V)``.
    """
    if hasattr(model, "loss_from_labels"):
        return model.loss_from_labels(batch.inputs, batch.labels), {}
    logits = model(input_ids=batch.inputs).logits
    if logits.shape[:-1] != batch.labels.shape:
        raise ValueError(
            f"logits must be (batch, time, vocabulary) for labels {tuple(batch.labels.shape)}; "
            f"they are {tuple(logits.shape)}"
        )
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    labels = batch.labels.flatten()
    total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1), {}


class StepModule(nn.Module):
    """A model together with its objective, as one module.

    Gradient synchronisation and mixed precision wrap a module's ``forward``. Wrapping this one leaves the user's model
    as it was, and covers objectives that call other methods of the model than ``forward``.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.objective(self.model, batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            raise TypeError(f"an objective must return (loss, metrics); got {type(result).__name__}")
        loss, metrics = result
        if loss.ndim != 0:
            raise ValueError(
                f"an objective's loss must be a scalar, the mean over the targets; its shape is {tuple(loss.shape)}"
            )
        return loss, {name: torch.as_tensor(value, device=loss.device).detach() for name, value in metrics.items()}
