"""A gated language model of another activation turned into a sparse ReLU one (Song et al. 2024, "ProSparse")."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from subquad.compress.sparse_feedforward import save_sparse, sparsify
from subquad.evaluation import sparsity
from subquad.layers.feedforward_sites import feedforward_sites
from subquad.training import Data, TrainingOptions, train
from subquad.training.progressive_l1 import PenaltyStage, ProgressiveL1

#: Where configurations name the activation; ours names the whole layer.
CONFIG_FIELDS = ("hidden_act", "hidden_activation", "activation_function")
OUR_LAYERS = {"swiglu": "reglu", "sglu": "reglu", "gelu": "relu"}


@dataclass(frozen=True)
class ProSparseResult:
    """What :func:`to_prosparse` did, measured on held-out windows before, after training, and with the threshold."""

    before: sparsity.SparsityMeasure
    trained: sparsity.SparsityMeasure
    final: sparsity.SparsityMeasure
    threshold: float


def substitute_relu(model: nn.Module) -> list[str]:
    """Puts ReLU in the place of the activation of every feed-forward layer, in place, and says so in the configuration.

    Returns:
        The names of the layers.

    Raises:
        ValueError: no feed-forward layers of a known kind.

    Example:
        >>> from subquad import SubquadConfig, SubquadForCausalLM
        >>> model = SubquadForCausalLM(SubquadConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1))
        >>> substitute_relu(model), model.config.feedforward
        (['model.layers.0.feedforward'], 'reglu')
    """
    sites = feedforward_sites(model)
    for site in sites:
        relu: Callable[[Any], Any] = nn.ReLU() if isinstance(site.activation, nn.Module) else torch.relu
        setattr(site.module, site.activation_attribute, relu)
    config: Any = getattr(model, "config", None)
    for field in CONFIG_FIELDS:
        if hasattr(config, field):
            setattr(config, field, "relu")
    if getattr(config, "feedforward", None) in OUR_LAYERS:
        config.feedforward = OUR_LAYERS[config.feedforward]
    return [site.name for site in sites]


def to_prosparse(
    model: nn.Module,
    data: Data,
    options: TrainingOptions,
    stages: Sequence[PenaltyStage | tuple[float, int]],
    windows: sparsity.Windows,
    out: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    percent: float = 1.0,
    resume: bool = False,
    console: Console | None = None,
) -> ProSparseResult:
    """Exchanges the activation, trains under a penalty that grows, raises the threshold, and writes the model.

    The folder is an ordinary one, whose weights any tool loads as a ReLU model;
    :func:`subquad.compress.sparse_feedforward.load_sparse` loads it with its threshold and skips inactive neurons.

    Args:
        model: a causal language model with gated feed-forward layers of any activation; trained in place.
        data, options: of the training, see :func:`subquad.training.train`.
        stages: of the penalty, see :class:`subquad.training.progressive_l1.ProgressiveL1`.
        windows: held-out token ids, on which sparsity and loss are measured and the threshold is chosen.
        out: folder for the model; checkpoints lie in ``out/training`` and a stopped run can be resumed from them.
        threshold: FATReLU's; None: the largest that raises the perplexity by at most ``percent``.
        resume: go on with the run in ``out``.
        console: where progress goes.

    Raises:
        ValueError: stages, windows or a model that do not fit; see the functions named here for more.
    """
    penalty = ProgressiveL1(stages)
    before = sparsity.measure(model, windows)
    substitute_relu(model)
    folder = os.path.join(out, "training")
    train(model, data, options, out=folder, resume=resume, objective=penalty, console=console)
    trained = sparsity.measure(model, windows)
    if threshold is None:
        threshold, final = sparsity.largest_gate_threshold(model, windows, percent)
    else:
        final = sparsity.measure(model, windows, sparsity.fat(threshold))
    sparsify(model, gate_threshold=threshold)
    save_sparse(model, out)
    return ProSparseResult(before, trained, final, threshold)
