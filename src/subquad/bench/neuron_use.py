"""Which neurons of a model's feed-forward layers matter, as a table, a plot and figures (Luo et al. 2024)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from subquad.evaluation import sparsity
from subquad.layers.feedforward_sites import feedforward_sites
from subquad.training.checkpoint import write_atomically


@dataclass(frozen=True)
class NeuronUse:
    """The activation ratio of a model at a bound on its perplexity, by layer, with the curve on the way.

    Attributes:
        model: its class.
        layers: names of the feed-forward layers.
        percent: the bound.
        found: see :func:`subquad.evaluation.sparsity.perplexity_sparsity`.
        zeros: the ratio that exact zeros alone leave.
    """

    model: str
    layers: tuple[str, ...]
    percent: float
    found: sparsity.PerplexitySparsity
    zeros: float

    def __rich__(self) -> Group:
        measure = self.found.measure
        table = Table("layer", "active neurons", "least norm of a neuron that counts")
        for layer, ratio in zip(self.layers, measure.by_layer):
            table.add_row(layer, f"{ratio:.1%}", f"{self.found.thresholds.by_layer[layer]:.3g}")
        sentence = (
            f"{self.model} needs {measure.ratio:.1%} of its neurons for a perplexity within {self.percent:g}% "
            f"({measure.perplexity_increase:+.2f}%); {1 - self.zeros:.1%} are exactly zero."
        )
        return Group(table, Text(sentence))

    def record(self) -> dict[str, Any]:
        """All figures, as JSON holds them."""
        return {
            "model": self.model,
            "percent": self.percent,
            "ratio": self.found.measure.ratio,
            "perplexity increase in percent": self.found.measure.perplexity_increase,
            "error of each layer": self.found.thresholds.error,
            "zeros": 1 - self.zeros,
            "layers": dict(zip(self.layers, self.found.measure.by_layer)),
            "curve": [
                {"error of each layer": c, "ratio": m.ratio, "perplexity increase in percent": m.perplexity_increase}
                for c, m in self.found.curve
            ],
        }

    def write(self, folder: Path) -> Path:
        """Writes ``sparsity.json`` and ``sparsity.png`` (perplexity against ratio, ratio by layer); the folder."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        curve, layers = figure.subplots(1, 2)
        points = sorted((100 * m.ratio, m.perplexity_increase) for _, m in self.found.curve)
        curve.plot(*zip(*points), marker="o", markersize=3)
        curve.axhline(self.percent, color="0.6", linewidth=1, linestyle="--")
        lowest = min(0.0, *(increase for _, increase in points))
        curve.set_ylim(lowest - 0.2 * self.percent, 4 * self.percent)  # what lies above is out of the question
        curve.set(xlabel="active neurons (%)", ylabel="more perplexity (%)", title="What leaving out costs")
        layers.bar(range(len(self.layers)), [100 * ratio for ratio in self.found.measure.by_layer])
        layers.xaxis.get_major_locator().set_params(integer=True)
        layers.set(xlabel="layer", ylabel="active neurons (%)", title=f"At {self.percent:g}% more perplexity")
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record(), indent=1) + "\n"
        write_atomically(folder / "sparsity.json", lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(folder / "sparsity.png", lambda path: figure.savefig(path, dpi=150, format="png"))
        return folder


def neuron_use(model: Any, windows: list[Tensor], percent: float = 1.0, *, tolerance: float = 1e-3) -> NeuronUse:
    """Measures a causal language model on batches of token ids; arguments as for ``perplexity_sparsity``."""
    zeros = sparsity.measure(model, windows).ratio
    found = sparsity.perplexity_sparsity(model, windows, percent, tolerance=tolerance)
    layers = tuple(site.name for site in feedforward_sites(model))
    return NeuronUse(type(model).__name__, layers, percent, found, zeros)
