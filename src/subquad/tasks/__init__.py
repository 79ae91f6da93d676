"""Data sets and task generators that need no download: the data of every experiment of the library.

Token tasks are made by name (``tasks.get("mqar", length=128)``) or by class (``tasks.Mqar.standard()``); texts by
``tasks.source_text()``, ``tasks.prose_text()`` and ``tasks.text_files("my.txt")``; pretrained models that ordinary
packages carry by ``tasks.pretrained("smollm2")``. Names resolve on first use, so importing this package imports
nothing heavy.
"""

import difflib
import importlib
from typing import Any

TASKS = {
    "mqar": "recall:Mqar",
    "copy": "recall:Copy",
    "reverse": "recall:Reverse",
    "selective_copy": "recall:SelectiveCopy",
    "induction": "recall:Induction",
    "overwriting": "recall:Overwriting",
    "needle": "needle:Needle",
    "set_intersection": "sets:SetIntersection",
    "parity": "state:Parity",
    "modular_arithmetic": "state:ModularArithmetic",
    "modular_arithmetic_brackets": "state:ModularArithmeticBrackets",
    "group_word": "state:GroupWord",
}

_PUBLIC = {
    "Batch": "contract:Batch",
    "TokenTask": "contract:TokenTask",
    "exact_match": "contract:exact_match",
    **{place.partition(":")[2]: place for place in TASKS.values()},
    "answer_matches": "needle:answer_matches",
    "group_elements": "state:group_elements",
    "TextData": "text:TextData",
    "source_text": "text:source_text",
    "prose_text": "text:prose_text",
    "text_files": "files:text_files",
    "digits": "images:digits",
    "TokenWorld": "token_world:TokenWorld",
    "dead_ends": "token_world:dead_ends",
    "byte_tokenizer": "tokenizer:byte_tokenizer",
    "train_bpe": "tokenizer:train_bpe",
    "Pretrained": "pretrained_models:Pretrained",
    "pretrained": "pretrained_models:pretrained",
}

__all__ = ["available", "get", *_PUBLIC]


def available() -> list[str]:
    """The names that :func:`get` knows, sorted."""
    return sorted(TASKS)


def get(name: str, *, preset: str = "tiny", **parameters: Any) -> Any:
    """The token task called ``name``: the values of its preset ("tiny" or "standard"), changed by ``parameters``.

    Raises:
        ValueError: no task or preset has this name, or a parameter's value does not fit.
        TypeError: the task has no such parameter.

    Example:
        >>> task = get("parity", length=16)
        >>> tuple(task.batch(4, seed=0, index=0).inputs.shape)
        (4, 16)
    """
    if name not in TASKS:
        if name in ("source_text", "prose_text", "text_files"):
            raise ValueError(f"{name!r} is a text, not a token task; call subquad.tasks.{name}(...)")
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no task is called {name!r}; did you mean {nearest!r}? available: {', '.join(available())}")
    if preset not in ("tiny", "standard"):
        raise ValueError(f"preset must be 'tiny' or 'standard'; got {preset!r}")
    return getattr(_load(TASKS[name]), preset)(**parameters)


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        nearest = difflib.get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = globals()[name] = _load(_PUBLIC[name])
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
