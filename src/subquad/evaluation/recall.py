"""How well a model finds again what stands in its own context: accuracy on token tasks."""

from typing import Any

import torch

from subquad.tasks import TokenTask

EVALUATION_SEED = 1_000_003  # of the scored batches: the same for every model and training seed


@torch.no_grad()
def recall_accuracy(
    model: Any,
    task: TokenTask,
    *,
    batches: int = 4,
    batch_size: int = 64,
    length: int | None = None,
    split: str = "test",
    seed: int = EVALUATION_SEED,
) -> float:
    """Share of the asked positions at which the likeliest token is the answer, 0 to 1.

    Args:
        model: ``model(input_ids=...).logits`` is ``(B, T, vocabulary)``.
        task: for instance ``tasks.Mqar()``.
        batches, batch_size, length: what is asked; the length is the task's own by default.
        split, seed: of the questions.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    right = asked = 0
    try:
        for index in range(batches):
            batch = task.batch(batch_size, seed=seed, index=index, split=split, length=length)
            predicted = model(input_ids=batch.inputs.to(device), use_cache=False).logits.argmax(-1).cpu()
            counted = batch.labels != -100
            right += int((predicted == batch.labels)[counted].sum())
            asked += int(counted.sum())
    finally:
        model.train(was_training)
    return right / asked
