"""Answers to a name: the class it stands for, or the nearest valid names."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

FEW = 20  # names that can all be listed beside the nearest


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that nothing answers to, with the nearest valid ones."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    sentences = [f"unknown {kind} {name!r}"]
    if near:
        sentences.append(f"did you mean {' or '.join(map(repr, near))}?")
    if not near or len(names) <= FEW:
        sentences.append(f"available: {', '.join(names)}")
    return ValueError("; ".join(sentences))


def load(path: str) -> Any:
    """The object at ``"package.module:Name"``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
