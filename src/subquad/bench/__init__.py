"""Measuring: whole comparisons of token mixers, and the timings that claims and benchmarks stand on."""

import importlib
from typing import Any

_PUBLIC = {
    "compare": "subquad.bench.comparison.command",
    "run_comparison": "subquad.bench.comparison.command",
    "CompareSettings": "subquad.bench.comparison.settings",
    "RecallSettings": "subquad.bench.comparison.settings",
    "Comparison": "subquad.bench.comparison.results",
    "injectivity": "subquad.bench.distinct_queries",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'subquad.bench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
