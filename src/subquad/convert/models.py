"""Converted models as ordinary transformers classes: ``model_type="subquad_F"`` for every source family F.

Nothing of transformers is imported with this module, and classes are made when they are asked for.

A configuration has all fields of F's and ``subquad``: recipe, layers, options and source. A model is F's own class,
whose constructor converts it. ``AutoModelForCausalLM.from_pretrained`` knows them once ``subquad`` and transformers are
imported; a folder also carries one line of Python by which tools that never import subquad load it.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.convert.sites import FAMILIES, Family

SHIM = "modeling_subquad_converted.py"
SHIM_TEXT = "from subquad.convert.models import {config}, {models}  # noqa: F401  (pip install subquad)\n"


class ConvertedConfig:
    """Mixed in before a family's configuration: what was converted, and how."""

    subquad: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; the models of the family are registered, so that the Auto classes find them."""
        register_models(FAMILIES[cls.model_type.removeprefix("subquad_")])  # type: ignore[attr-defined]
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


class ConvertedModel:
    """Mixed in before a family's model: its attention is converted as its configuration says."""

    _is_stateful = True
    _keep_in_fp32_modules_strict = ("subquad",)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        from subquad.convert.recipes import recipe
        from subquad.convert.swapping import convert_layers

        record = config.subquad or {}
        if not {"recipe", "layers", "options"} <= set(record):
            raise ValueError(f"the configuration says not how its model was converted: subquad = {record!r}")
        convert_layers(self, recipe(record["recipe"]), record["layers"], record["options"])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from subquad.convert.attention import parts_of_cores

        if not any(module is part for part in parts_of_cores(self)):
            super()._init_weights(module)  # type: ignore[misc]
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Converted layers keep their own states; every other kind of cache than the growing one is refused."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: "
                "a converted layer keeps its own state"
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers, and one line of Python for tools that never import subquad."""
        config: Any = self.config  # type: ignore[attr-defined]
        family = FAMILIES[config.model_type.removeprefix("subquad_")]
        module = SHIM.removesuffix(".py")
        names = {auto: f"Subquad{name}" for auto, name in family.models}
        config.auto_map = {"AutoConfig": f"{module}.{type(config).__name__}"} | {
            auto: f"{module}.{name}" for auto, name in names.items()
        }
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        text = SHIM_TEXT.format(config=type(config).__name__, models=", ".join(names.values()))
        Path(save_directory, SHIM).write_text(text)


@functools.cache
def converted_config_class(family: Family) -> type[Any]:
    """The configuration class of converted models of a family."""
    source = family.config_class
    return type(
        f"Subquad{source.__name__}",
        (ConvertedConfig, source),
        {
            "__module__": __name__,
            "__doc__": f"{source.__name__} of a converted model.",
            "__annotations__": {"subquad": dict | None},
            "model_type": f"subquad_{family.name}",
            "subquad": None,
        },
    )


@functools.cache
def converted_model_class(source: type[Any], family: Family) -> type[Any]:
    """The converted form of one of a family's model classes."""
    return type(
        f"Subquad{source.__name__}",
        (ConvertedModel, source),
        {
            "__module__": __name__,
            "__doc__": f"{source.__name__}, converted as its configuration says.",
            "config_class": converted_config_class(family),
        },
    )


@functools.cache
def register_models(family: Family) -> None:
    """Tells transformers' Auto classes of the converted models of a family."""
    from transformers.models.auto import modeling_auto

    config = converted_config_class(family)
    for auto, name in family.models:
        source = getattr(family.modeling, name)
        getattr(modeling_auto, auto).register(config, converted_model_class(source, family), exist_ok=True)


def mark_converted(
    model: Any, name: str, layers: Sequence[int], options: Mapping[str, Any], family: Family, source: str | None
) -> None:
    """Makes a model that was converted in place one that saves and loads as such; configuration and model stay the same
    objects."""
    register_models(family)
    model.config.__class__ = converted_config_class(family)
    model.config.subquad = {
        "recipe": name,
        "layers": list(layers),
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
        "source": source,
    }
    model.__class__ = converted_model_class(type(model), family)


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if name == f"Subquad{family.stem}Config":
            return converted_config_class(family)
        for _, model in family.models:
            if name == f"Subquad{model}":
                return converted_model_class(getattr(family.modeling, model), family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
