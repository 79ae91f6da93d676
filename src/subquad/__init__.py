"""Subquad: sequence models whose cost does not grow with the square of their input.

``subquad.ops`` holds the operations, ``subquad.mixers`` the layers, ``subquad.models`` whole models, ``subquad.tasks``
data, ``subquad.training`` the loop. Importing this package imports none of them; each loads at first use.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from subquad._auto_classes import register_with_transformers

try:
    __version__ = version("subquad")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_ROOMS = (
    "bench",
    "blocks",
    "catalog",
    "claims",
    "compress",
    "convert",
    "evaluation",
    "feedforward",
    "inference",
    "layers",
    "mixers",
    "models",
    "ops",
    "positions",
    "tasks",
    "training",
)
_NAMES = {
    "SubquadConfig": "subquad.models",
    "SubquadModel": "subquad.models",
    "SubquadForCausalLM": "subquad.models",
    "SubquadForMaskedLM": "subquad.models",
    "SubquadForSequenceClassification": "subquad.models",
    "optimize": "subquad.inference.optimize",
}
__all__ = ["__version__", *_ROOMS, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"subquad.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'subquad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_transformers()
