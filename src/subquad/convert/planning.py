"""What a conversion would do to a model, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from subquad.convert.recipes import Recipe, recipe
from subquad.convert.sites import PROJECTIONS, Site, choose_layers, find_sites
from subquad.evaluation.report import bytes_text, count_text
from subquad.mixers.contract import named_leaves
from subquad.mixers.cores import Heads


@dataclass(frozen=True)
class Plan:
    """A conversion in figures.

    Attributes:
        source: the model's class.
        recipe: its name, and what attention becomes.
        sites: names of all attention layers.
        layers: numbers of those that are converted.
        parameters: of the source.
        added: parameters that the conversion adds.
        transferred, adapted: parameters that the two stages train.
        state_bytes: what all layers hold after ``context`` tokens of one row, by context: before and after.
    """

    source: str
    recipe: str
    summary: str
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int
    added: int
    transferred: int
    adapted: int
    state_bytes: dict[int, tuple[int, int]]

    def __rich__(self) -> Group:
        kept = len(self.sites) - len(self.layers)
        lines = [
            f"{self.source}: {len(self.sites)} attention layers, {count_text(self.parameters)} parameters",
            f"{self.recipe}: {self.summary}",
            f"{len(self.layers)} layers are converted, {kept} stay softmax; {count_text(self.added)} parameters added",
            f"trained: {count_text(self.transferred)} in transfer, {count_text(self.adapted)} in adaptation",
        ]
        table = Table("Tokens", "Key-value cache of the source", "State after conversion", "Ratio")
        for context, (before, after) in self.state_bytes.items():
            table.add_row(f"{context:,}", bytes_text(before), bytes_text(after), f"{before / after:.1f}")
        return Group(*map(Text, lines), table)


CONTEXTS = (1024, 8192, 32768)


def plan(model: Any, to: str | Recipe, *, layers: str | Sequence[int] = "all", **options: Any) -> Plan:
    """What ``subquad convert`` would do with ``model``, which stays as it is.

    Args:
        model, to, layers, options: see :func:`subquad.convert.swap`.

    Raises:
        ValueError: what is refused, as :func:`~subquad.convert.swap` refuses it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2))
        >>> plan(model, "liger", window=4).added
        0
    """
    chosen = recipe(to) if isinstance(to, str) else to
    sites = find_sites(model)
    numbers = choose_layers(len(sites), layers)
    cores = {layer: chosen.build(sites[layer], options) for layer in numbers}
    added = sum(p.numel() for core in cores.values() for p in core.parameters())
    adapted = 0
    if chosen.adapt is not None:
        adapted = sum(_adapter_size(sites[layer], chosen) for layer in numbers)
        adapted += added if chosen.adapt.train_cores else 0
    sizes = {}
    for context in CONTEXTS:
        kept = [_kept(site, context) for site in sites]
        sizes[context] = (
            sum(kept),
            sum(_state(sites[n], cores[n]) if n in cores else kept[n] for n in range(len(sites))),
        )
    return Plan(
        source=type(model).__name__,
        recipe=chosen.name,
        summary=chosen.summary,
        sites=tuple(site.name for site in sites),
        layers=tuple(numbers),
        parameters=sum(p.numel() for p in model.parameters()),
        added=added,
        transferred=added if chosen.transfer is not None else 0,
        adapted=adapted,
        state_bytes=sizes if sites[0].causal else {},
    )


def _kept(site: Site, context: int) -> int:
    return site.kept_bytes_per_token * min(context, site.sliding_window or context)


def _state(site: Site, core: Any) -> int:
    """Bytes of a core's state once its window is full; of one that grows, at the shortest context of the plan."""
    if not site.causal:
        return 0
    dtype = next(site.module.parameters()).dtype
    length = max(getattr(core, "window", None) or 0, 2) * 3 if core.constant_state else CONTEXTS[0]
    q, k = (
        torch.zeros(1, length, heads, site.head_dim, dtype=dtype)
        for heads in (site.num_heads, site.num_key_value_heads)
    )
    with torch.no_grad():
        _, state = core(Heads(q, k, k, q, k, site.scale), use_state=True)
    leaves: list[Tensor] = [leaf for _, leaf in named_leaves(state)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _adapter_size(site: Site, chosen: Recipe) -> int:
    assert chosen.adapt is not None
    names = {n for kind, n in zip(PROJECTIONS, site.family.projections) if kind in chosen.adapt.projections}
    weights = [dict(site.module.named_modules())[name].weight for name in names if "." not in name]
    return chosen.adapt.rank * sum(sum(weight.shape) for weight in weights)
