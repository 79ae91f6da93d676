"""Where a model has its feed-forward layers, found by structure: ours, and those of Hugging Face's language models."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: (gate, up, down) by the names of the submodules; gate is None where there is none.
LAYOUTS: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),  # llama, mistral, qwen, gemma and ours
    ("w1", "w3", "w2"),  # mixtral's experts
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),  # opt, phi, bart
    (None, "c_fc", "c_proj"),  # gpt2
    (None, "dense_h_to_4h", "dense_4h_to_h"),  # gpt_neox, bloom, falcon
)
ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act", "gelu_impl")


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward layer: ``down(act(gate x) * (up x))``, or ``down(act(up x))`` without a gate.

    Attributes:
        name: of the module that holds it, as in ``model.named_modules()``.
        module: that module.
        children: the names of gate, up and down in that module; the first is None where there is no gate.
        gate, up, down: its projections (``nn.Linear`` or transformers' ``Conv1D``).
        activation: the elementwise function.
        activation_attribute: where the module holds it.
    """

    name: str
    module: nn.Module
    children: tuple[str | None, str, str]
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    activation: Callable[[Tensor], Tensor]
    activation_attribute: str

    @property
    def down_weight(self) -> Tensor:
        """``(D, F)``, whichever way round the module holds it."""
        weight: Tensor = self.down.weight  # type: ignore[assignment]
        return weight if isinstance(self.down, nn.Linear) else weight.mT

    @property
    def hidden(self) -> int:
        return self.down_weight.shape[1]


def feedforward_sites(model: nn.Module) -> list[FeedForwardSite]:
    """All feed-forward layers of a model, in the order of its modules.

    Raises:
        ValueError: there is none; the kinds of modules that were found are named.

    Example:
        >>> from subquad import SubquadConfig, SubquadForCausalLM
        >>> model = SubquadForCausalLM(SubquadConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2))
        >>> [site.hidden for site in feedforward_sites(model)] == [model.config.intermediate_size] * 2
        True
    """
    sites = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for gate, up, down in LAYOUTS:
            if up not in children or down not in children or (gate is not None and gate not in children):
                continue
            held = next((attribute for attribute in ACTIVATIONS if callable(getattr(module, attribute, None))), None)
            if held is not None and all(_is_projection(children[n]) for n in (gate, up, down) if n):
                projections = (children[gate] if gate else None, children[up], children[down])
                site = FeedForwardSite(name, module, (gate, up, down), *projections, getattr(module, held), held)
                sites.append(site)
            break
    if not sites:
        kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        raise ValueError(
            f"no feed-forward layer with two or three projections and an activation was found; modules: {kinds}"
        )
    return sites


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point()
