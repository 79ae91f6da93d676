"""Mixers taken apart into their systems and laid side by side: state, spectrum, memory, and how well it all adds up."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from subquad import mixers
from subquad.bench.systems import measures
from subquad.evaluation.report import bytes_text
from subquad.mixers import Mixer
from subquad.models import SubquadForCausalLM
from subquad.ops.dynamics import RecurrentSystem, System


@dataclass(frozen=True)
class Part:
    """One system of one mixer on the inputs that it was given.

    Attributes:
        name: of the mixer; with its layer in a model.
        system: what was extracted.
        weights: its unrolled weights ``(B, H, T, T n)``.
        outside: what else mixes tokens in the mixer.
        error: largest difference between the mixer's output and the one rebuilt from its systems, of the largest value.
    """

    name: str
    system: System
    weights: Tensor
    outside: tuple[str, ...]
    error: float

    def figures(self) -> dict[str, Any]:
        """The row of the table: medians over heads, state bytes per sequence at this length in float32."""
        heads, tokens = self.weights.shape[1], self.weights.shape[2]
        row: dict[str, Any] = {
            "mixer": self.name,
            "op": self.system.op,
            "transition": self.system.transition,
            "tokens": tokens,
            "state_bytes": 4 * heads * self.system.state_size(tokens),
            "half_life": None,
            "longest_half_life": None,
            "coupling": None,
            "memory_rank": float(measures.memory_rank(self.weights).double().mean()),
            "reach": float(measures.reach(self.weights).mean()),
            "outside": list(self.outside),
            "error": self.error,
        }
        if isinstance(self.system, RecurrentSystem):
            lives = measures.half_lives(self.system)
            row["half_life"], row["longest_half_life"] = float(lives.median()), float(lives.max())
            row["coupling"] = float(measures.coupling(self.system).median())
        return row


@dataclass(frozen=True)
class Analysis:
    """Systems side by side, and the mixers that are none, with the reason."""

    parts: tuple[Part, ...]
    refused: dict[str, str]

    def table(self) -> Table:
        """For a rich console."""
        worst = max((part.error for part in self.parts), default=0.0)
        caption = f"{CAPTION} Outputs were rebuilt from the systems to {worst:.0e} of their largest value."
        table = Table(
            title="mixers as linear time-varying systems", caption=caption, caption_justify="left", box=box.SIMPLE
        )
        table.add_column("mixer", no_wrap=True)
        table.add_column("transition")
        for heading in ("state", "half-life", "coupling", "rank", "reach"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in map(Part.figures, self.parts):
            state, half_life, _, coupling, rank, reach, _ = cells(row)
            table.add_row(row["mixer"], row["transition"], state, half_life, coupling, rank, reach)
        return table

    def write(self, folder: Path) -> Path:
        """Writes ``analysis.html``, its plots and ``analysis.json``; returns the page's path."""
        from subquad.bench.systems.page import write_analysis  # matplotlib loads here

        return write_analysis(self, folder)


CAPTION = (
    "state: bytes kept per sequence; half-life: tokens until half of a mode is forgotten, median; coupling: of keeping "
    "with writing, -1 to 1; rank: numbers of the first half of the tokens that reach the second; reach: tokens back "
    "that hold 95% of the weight."
)


def cells(row: dict[str, Any]) -> list[str]:
    """The figures of a row as text."""
    number = lambda value: "–" if value is None else "stays" if value == float("inf") else f"{value:.3g}"  # noqa: E731
    return [
        bytes_text(row["state_bytes"]),
        *(number(row[key]) for key in ("half_life", "longest_half_life", "coupling", "memory_rank", "reach")),
        f"{row['error']:.0e}",
    ]


def take_apart(name: str, mixer: Mixer, x: Tensor) -> list[Part]:
    """The systems of a mixer on ``x (B, T, D)``.

    Raises:
        ValueError: a mixer that is no linear system.
    """
    dynamics = mixer.dynamics(x)
    with torch.no_grad():
        output = mixer(x).output
    error = float((dynamics.output - output).abs().max() / output.abs().max())
    several = len(dynamics.systems) > 1
    return [
        Part(f"{name}, op {number}" if several else name, system, system.weights(), dynamics.outside, error)
        for number, system in enumerate(dynamics.systems, start=1)
    ]


def analyze_mixers(
    names: Sequence[str], *, dim: int = 64, num_heads: int = 4, tokens: int = 128, seed: int = 0
) -> Analysis:
    """Untrained mixers by name, each on the same two rows of normal noise.

    Args:
        names: of mixers; unknown ones raise.
        dim, num_heads: of each.
        tokens: T, at most 1,024.
        seed: of the weights and the noise.
    """
    x = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(seed))
    parts: list[Part] = []
    refused: dict[str, str] = {}
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer = mixers.build(name, dim, num_heads=num_heads).eval()
        _add(name, mixer, x, parts, refused)
    return Analysis(tuple(parts), refused)


@torch.no_grad()
def analyze_model(model: SubquadForCausalLM, input_ids: Tensor) -> Analysis:
    """The mixers of a trained model, each on what reaches it when the model reads ``input_ids (B, T)``."""
    model = model.eval()
    layers = model.model.mixers()
    seen: dict[int, Tensor] = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda mixer, inputs, layer=layer: seen.__setitem__(layer, inputs[0]))
        for layer, mixer in enumerate(layers)
    ]
    try:
        model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    parts: list[Part] = []
    refused: dict[str, str] = {}
    for layer, mixer in enumerate(layers):
        _add(f"layer {layer}: {type(mixer).__name__}", mixer, seen[layer], parts, refused)
    return Analysis(tuple(parts), refused)


def _add(name: str, mixer: Mixer, x: Tensor, parts: list[Part], refused: dict[str, str]) -> None:
    try:
        parts += take_apart(name, mixer, x)
    except ValueError as error:
        refused[name] = str(error)
