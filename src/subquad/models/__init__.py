"""Whole models, as ordinary members of the libraries their users already have."""

from typing import Any

_NAMES = {
    "SubquadConfig": "subquad.models.config",
    "SubquadModel": "subquad.models.language",
    "SubquadForCausalLM": "subquad.models.language",
    "SubquadForMaskedLM": "subquad.models.language",
    "SubquadForSequenceClassification": "subquad.models.language",
    "EncoderDecoder": "subquad.models.seq2seq",
    "Hopfield": "subquad.models.recurrent",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
