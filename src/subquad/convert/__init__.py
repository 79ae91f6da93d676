"""Conversion of pretrained Transformers: attention replaced in place, repaired by training, saved as usual folders."""

import importlib
from typing import Any

_NAMES = {
    "swap": "subquad.convert.swapping",
    "find_sites": "subquad.convert.sites",
    "FAMILIES": "subquad.convert.sites",
    "Recipe": "subquad.convert.recipes",
    "RECIPES": "subquad.convert.recipes",
    "as_source": "subquad.convert.attention",
    "plan": "subquad.convert.planning",
    "Plan": "subquad.convert.planning",
    "plan_folder": "subquad.convert.pipeline",
    "untrained_cost": "subquad.convert.pipeline",
    "run": "subquad.convert.pipeline",
    "Conversion": "subquad.convert.pipeline",
    "ConvertSettings": "subquad.convert.settings",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
