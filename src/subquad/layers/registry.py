"""Answers to a name: the class it stands for, or the nearest valid names."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that nothing answers to, with the nearest valid ones."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}; {hint}available: {', '.join(names)}")


def load(path: str) -> Any:
    """The object at ``"package.module:Name"``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
