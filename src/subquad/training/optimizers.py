"""AdamW with the usual parameter groups, and learning-rate schedules: torch's own, chosen and set up here.

AdamW: Loshchilov and Hutter 2019. One-cycle: Smith and Topin 2018.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .options import TrainingOptions

OptimizerFactory = Callable[[nn.Module, TrainingOptions], Optimizer]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, with and without weight decay; shared ones appear once.

    No decay for biases, embeddings (also where an output head shares them), norms, anything with fewer than two
    dimensions (gains, decays per head), and any parameter with a true attribute ``_no_weight_decay``.

    Returns:
        Groups for a torch optimizer, each ``{"params": [(name, parameter), ...], "weight_decay": ...}``; none is empty.

    Raises:
        ValueError: no parameter of the model requires a gradient.
    """
    free = set()
    for module_name, module in model.named_modules():
        is_free = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(module_name, recurse=False):
            is_bias = name.rpartition(".")[2].endswith("bias")
            if is_free or is_bias or parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False):
                free.add(id(parameter))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient: there is nothing to train")
    decayed = {"params": [(n, p) for n, p in trainable if id(p) not in free], "weight_decay": weight_decay}
    undecayed = {"params": [(n, p) for n, p in trainable if id(p) in free], "weight_decay": 0.0}
    return [group for group in (decayed, undecayed) if group["params"]]


def adamw(model: nn.Module, options: TrainingOptions) -> Optimizer:
    """torch's AdamW over :func:`parameter_groups`."""
    groups = parameter_groups(model, options.weight_decay)
    return AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.epsilon)


def learning_rate_schedule(optimizer: Optimizer, options: TrainingOptions) -> LRScheduler:
    """The scheduler of ``options.schedule``, to be stepped once after every optimizer step.

    With w warm-up steps of n, step s = 1..n uses the peak rate times s / w while s <= w; then 1 (``constant``), or
    f + (1 - f) (1 + cos(pi (s - 1 - w) / (n - w))) / 2 (``cosine``; f is the final rate over the peak, which the step
    after the last would reach, so that no step is idle).
    """
    if options.schedule == "one_cycle":
        return OneCycleLR(
            optimizer,
            max_lr=options.learning_rate,
            total_steps=options.steps,
            pct_start=options.warmup_steps / options.steps,
            cycle_momentum=False,
        )
    warmup, steps = options.warmup_steps, options.steps
    final = options.final_learning_rate / options.learning_rate

    def factor(done: int) -> float:
        step = done + 1
        if step <= warmup:
            return step / warmup
        if options.schedule == "constant":
            return 1.0
        progress = min((done - warmup) / (steps - warmup), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
