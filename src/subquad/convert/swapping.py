"""Conversion in place: chosen attention layers get another attention function and keep all that they have."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from subquad.convert.attention import converted_layers, give_layout, install
from subquad.convert.models import mark_converted
from subquad.convert.recipes import Recipe, recipe
from subquad.convert.sites import Site, choose_layers, find_sites


def swap(
    model: Any,
    to: str | Recipe,
    *,
    layers: str | Sequence[int] = "all",
    seed: int = 0,
    **options: Any,
) -> Any:
    """Converts ``model`` in place, untrained: the same object, as one that saves, loads and generates as converted.

    Projections, norms, positions and everything outside attention are the source's own. Layers that are not named stay
    softmax.

    Args:
        model: a causal language model or encoder of transformers, of a family in ``convert.FAMILIES``.
        to: a recipe, or its name.
        layers: ``"all"``, ``"every:n"`` (all but every n-th) or numbers.
        seed: of new parameters.
        options: of the recipe.

    Returns:
        ``model``.

    Raises:
        ValueError: a family, recipe, layer or option that does not exist or fit, or a model that is converted already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> type(swap(LlamaForCausalLM(config), "liger", layers=[0], window=4)).__name__
        'SubquadLlamaForCausalLM'
    """
    chosen = recipe(to) if isinstance(to, str) else to
    sites = find_sites(model)
    numbers = choose_layers(len(sites), layers)
    checked = chosen.checked(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convert_layers(model, chosen, numbers, checked)
    source = getattr(model.config, "_name_or_path", None) or None
    mark_converted(model, chosen.name, numbers, checked, sites[0].family, source)
    return model


def convert_layers(model: Any, chosen: Recipe, layers: Sequence[int], options: Mapping[str, Any]) -> None:
    """Gives the layers of a source model, by number, the cores of a recipe."""
    if converted_layers(model):
        raise ValueError(f"this {type(model).__name__} is converted already")
    sites = find_sites(model)
    cores = [chosen.build(sites[layer], options) for layer in layers]
    for layer, core in zip(layers, cores):
        parameter = next(sites[layer].module.parameters())
        core.to(parameter.device)
        core.train(sites[layer].module.training)
        install(sites[layer], core)
    _stack_of(model, sites).register_forward_pre_hook(give_layout, with_kwargs=True)


def _stack_of(model: Any, sites: Sequence[Site]) -> Any:
    """The innermost model of transformers that holds all sites: it is called in every way that leads to them."""
    inside = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(f".{site.name}.".startswith(f".{name}.") for site in sites)
    ]
    return max([("", model), *inside], key=lambda pair: len(pair[0]))[1]
