"""Objectives: from a model and a batch to a mean loss and named metrics."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import IGNORED, BatchLike


class Objective(Protocol):
    """What the loop minimises."""

    def __call__(self, model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The scalar mean loss over the batch's targets (with its graph), and scalar means to record beside it."""
        ...


@runtime_checkable
class ScheduledObjective(Protocol):
    """An objective that changes on the way: the loop tells it the number of each step before the step's batches."""

    def begin_step(self, step: int) -> None:
        """``step`` = 1, 2, ...; a resumed run begins with the first step that was not done."""
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


class PrefixLM:
    """Next tokens after a prefix, and masked tokens inside it (Arora et al. 2024b, "Just read twice", section 4.2).

    In the prefix each token is replaced by the mask token with probability ``mask_rate``. The loss is the mean over the
    labels after the prefix, plus ``mask_weight`` times the mean over the masked tokens, each of which is asked for in
    its own place. The first token after the prefix is never asked for: what would predict it lies inside, where all
    is seen.

    Args:
        mask_token_id: what stands for a masked token; an id that the data does not hold.
        prefix: tokens of the prefix, or the least and the most of a length drawn for each row.
        mask_rate: 0 trains on the rest alone.
        mask_weight: of the masked tokens' mean.

    Example:
        >>> PrefixLM(mask_token_id=0, prefix=(2, 3)).lengths(1, 8, "cpu").shape
        torch.Size([1])
    """

    def __init__(
        self, mask_token_id: int, prefix: int | tuple[int, int], *, mask_rate: float = 0.15, mask_weight: float = 0.25
    ) -> None:
        least, most = (prefix, prefix) if isinstance(prefix, int) else prefix
        if not 0 <= least <= most:
            raise ValueError(f"prefix must be a number of tokens >= 0, or the least and the most; got {prefix}")
        if not isinstance(mask_token_id, int) or mask_token_id < 0:
            raise ValueError(f"mask_token_id must be a token id; got {mask_token_id!r} (the tokenizer needs one)")
        if not 0 <= mask_rate < 1 or mask_weight < 0:
            raise ValueError(f"mask_rate must lie in [0, 1) and mask_weight be >= 0; got {mask_rate}, {mask_weight}")
        self.mask_token_id, self.least, self.most = mask_token_id, least, most
        self.mask_rate, self.mask_weight = mask_rate, mask_weight

    def lengths(self, batch: int, time: int, device: torch.device | str) -> Tensor:
        """Prefix lengths ``(B,)`` of a batch, from torch's generator.

        Raises:
            ValueError: rows that end with the prefix or before it.
        """
        if self.most >= time:
            raise ValueError(f"a prefix of {self.most} tokens leaves nothing to predict in rows of {time}")
        return torch.randint(self.least, self.most + 1, (batch,), device=device)

    def __call__(self, model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        inputs = batch.inputs
        lengths = self.lengths(*inputs.shape, inputs.device)
        inside = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        masked = inside & (torch.rand(inputs.shape, device=inputs.device) < self.mask_rate)
        labels = batch.labels.where(~inside, IGNORED)
        after = labels != IGNORED
        labels = torch.where(masked, inputs, labels)
        weights = after / after.sum().clamp(min=1) + self.mask_weight * masked / masked.sum().clamp(min=1)
        loss = model.loss_from_labels(
            inputs.where(~masked, self.mask_token_id), labels, weights=weights, prefix_lengths=lengths
        )
        return loss, {"masked share": masked.sum() / inside.sum().clamp(min=1)}


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
