"""Existing models made faster or safer without training; names resolve on first use."""

import importlib
from typing import Any

_NAMES = {
    "hip": "hip_attention",
    "recycle": "recycled",
    "RectifyLogits": "rectify",
    "DeadEndValue": "dead_end_value",
    "train_value": "dead_end_value",
    "sample_and_score": "dead_end_value",
    "JustReadTwice": "read_twice",
    "read_twice_state": "read_twice",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"subquad.inference.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
