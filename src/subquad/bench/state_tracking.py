"""State tracking: which mixers follow a state over lengths that they were not trained on, and by which eigenvalues.

Source: Grazzi et al. 2025, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", sections 4 and 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from subquad import tasks
from subquad.bench.trials import TaskTrial
from subquad.layers.norms import l2_normalize
from subquad.mixers import Mixer
from subquad.mixers.delta_net import DeltaNet, DeltaProduct, GatedDeltaNet
from subquad.mixers.gla import GatedLinearAttention
from subquad.mixers.lightning import LightningAttention
from subquad.mixers.linear import LinearAttention
from subquad.mixers.retention import Retention
from subquad.models import SubquadForCausalLM

DEFAULT_FIELDS = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "positions": "none",
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
}


@dataclass(frozen=True)
class StateTrackingRow:
    """Scaled accuracy, (accuracy - chance) / (1 - chance), by test length: over all labels and at each row's last."""

    task: str
    mixer: str
    seed: int
    scaled_accuracy: Mapping[int, float]
    scaled_last_accuracy: Mapping[int, float]


def state_tracking(
    mixers: Sequence[str] | Mapping[str, str | dict[str, Any]],
    task_names: Sequence[str | tasks.TokenTask] = ("parity",),
    *,
    train_length: int = 40,
    test_lengths: Sequence[int] = (40, 64, 128, 256),
    steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
    growing: bool = True,
    seeds: Sequence[int] = (0, 1),
    fields: Mapping[str, Any] | None = None,
) -> list[StateTrackingRow]:
    """Trains every mixer on every task at short lengths and tests it at longer ones; every seed is a row.

    Args:
        mixers: names, or labels with an entry of :class:`SubquadConfig`'s ``mixers``, as in
            ``{"negative": {"name": "delta_net", "eigenvalues": [-1, 1]}}``.
        task_names: of :func:`subquad.tasks.get`, or tasks. Whether the target stands at every position or at the last
            one is the task's ``targets``: the first is far easier.
        train_length, test_lengths: T; each must be one that the task can fill.
        steps, batch_size, learning_rate: of AdamW under a one-cycle schedule, without weight decay.
        growing: whether training begins with short sequences and grows over its first half. Without it success
            depends on the seed.
        seeds: one run each; success depends on it, so none is left out.
        fields: of the configuration, over ``DEFAULT_FIELDS``.

    Example:
        >>> rows = state_tracking(["gla"], train_length=8, test_lengths=[8, 16], steps=8, batch_size=4, seeds=[0])
        >>> sorted(rows[0].scaled_accuracy)
        [8, 16]
    """
    entries = mixers if isinstance(mixers, Mapping) else {name: name for name in mixers}
    lengths = tuple(test_lengths)
    rows = []
    for named in task_names:
        task = tasks.get(named) if isinstance(named, str) else named
        for length in (train_length, *lengths):
            task.check_length(length)
        trial = TaskTrial(
            fields={**DEFAULT_FIELDS, **(fields or {})},
            task=task,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.0,
            length=train_length,
            growing=growing,
            test_lengths=lengths,
        )
        for label, entry in entries.items():
            for seed in seeds:
                scores = trial.run({"mixers": entry}, seed)
                everywhere, last = (
                    {t: task.scaled_accuracy(scores[f"{measure} at {t}"]) for t in lengths}
                    for measure in ("accuracy", "last accuracy")
                )
                rows.append(StateTrackingRow(task.name, label, seed, everywhere, last))
    return rows


def state_tracking_table(rows: Sequence[StateTrackingRow]) -> Table:
    """Rows of :func:`state_tracking` for a rich console, "all labels / last label" in each cell."""
    table = Table(caption="scaled accuracy: all labels / last label of a row", caption_justify="left")
    lengths = list(dict.fromkeys(length for row in rows for length in row.scaled_accuracy))
    for column in ("task", "mixer", "seed", *(f"T {length}" for length in lengths)):
        table.add_column(column, justify="left" if column in ("task", "mixer") else "right")
    for row in rows:
        cells = (
            f"{row.scaled_accuracy[t]:.2f} / {row.scaled_last_accuracy[t]:.2f}" if t in row.scaled_accuracy else "-"
            for t in lengths
        )
        table.add_row(row.task, row.mixer, str(row.seed), *cells)
    return table


@dataclass(frozen=True)
class LayerEigenvalues:
    """The eigenvalues of one layer's state transitions on some data.

    Attributes:
        layer, mixer: which.
        values: every eigenvalue, one axis: for decays one per token, head and channel (or head); for delta updates that
            along the key, ``a (1 - beta)``, the others being the decay a.
    """

    layer: int
    mixer: str
    values: Tensor

    @property
    def negative_share(self) -> float:
        """The share of eigenvalues below 0."""
        return float((self.values < 0).double().mean())

    def histogram(self, bins: int = 20) -> tuple[Tensor, Tensor]:
        """Shares ``(bins,)`` and edges ``(bins + 1,)`` over [-1, 1]."""
        counts, edges = torch.histogram(self.values.float().clamp(-1, 1), bins, range=(-1.0, 1.0))
        return counts / len(self.values), edges


@torch.no_grad()
def eigenvalue_report(model: SubquadForCausalLM, inputs: Tensor) -> list[LayerEigenvalues]:
    """Which eigenvalues the layers of a model use on ``inputs (B, T)``.

    Raises:
        ValueError: a mixer whose state has no transition matrix to report (the message lists those that have).
    """
    model_mixers = model.model.mixers()
    readers = [_reader(mixer) for mixer in model_mixers]
    outputs: list[dict[str, Tensor]] = [{} for _ in model_mixers]
    hooks = []
    for reader, kept in zip(readers, outputs):
        for name, module in reader.watched.items():
            hooks.append(module.register_forward_hook(_keep(kept, name)))
    try:
        model(input_ids=inputs.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerEigenvalues(layer, type(mixer).__name__, reader.eigenvalues(kept).float().flatten().cpu())
        for layer, (mixer, reader, kept) in enumerate(zip(model_mixers, readers, outputs))
    ]


@dataclass(frozen=True)
class _Reader:
    """Submodules whose outputs decide a mixer's eigenvalues, and how."""

    watched: Mapping[str, nn.Module]
    eigenvalues: Callable[[dict[str, Tensor]], Tensor]


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[name] = output

    return hook


def _delta(mixer: DeltaNet | DeltaProduct) -> _Reader:
    if isinstance(mixer, DeltaNet) and mixer.normalize is not l2_normalize:
        raise ValueError("eigenvalues along the key are 1 - beta for keys of length 1 only: qk_norm='l2'")

    def along_key(kept: dict[str, Tensor]) -> Tensor:
        return 1 - mixer.largest_beta * torch.sigmoid(kept["beta"].float())

    gate = mixer.gate if isinstance(mixer, GatedDeltaNet | DeltaProduct) else None
    if gate is None:
        return _Reader({"beta": mixer.b_proj}, along_key)
    if isinstance(mixer, DeltaProduct):  # the decay belongs to the first of a token's updates
        updates = mixer.num_householder

        def product(kept: dict[str, Tensor]) -> Tensor:
            factors = along_key(kept).unflatten(-1, (updates, -1)).clone()
            factors[..., 0, :] *= kept["log_decay"].exp()
            return factors

        return _Reader({"beta": mixer.b_proj, "log_decay": gate}, product)
    return _Reader({"beta": mixer.b_proj, "log_decay": gate}, lambda kept: kept["log_decay"].exp() * along_key(kept))


def _gates(mixer: GatedLinearAttention) -> _Reader:
    temperature = mixer.gate_temperature
    return _Reader({"gate": mixer.gk_proj}, lambda kept: (logsigmoid(kept["gate"].float()) / temperature).exp())


READERS: dict[type[Mixer], Callable[[Any], _Reader]] = {
    DeltaNet: _delta,
    DeltaProduct: _delta,
    GatedLinearAttention: _gates,
    LightningAttention: lambda mixer: _Reader({}, lambda kept: torch.exp(-mixer.slope)),
    Retention: lambda mixer: _Reader({}, lambda kept: torch.exp(-mixer.slope)),
    LinearAttention: lambda mixer: _Reader({}, lambda kept: torch.ones(mixer.num_heads)),
}


def _reader(mixer: Mixer) -> _Reader:
    kind = next((kind for kind in READERS if isinstance(mixer, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in READERS)
        raise ValueError(f"{type(mixer).__name__} has no state transition to report; those that have: {known}")
    return READERS[kind](mixer)
