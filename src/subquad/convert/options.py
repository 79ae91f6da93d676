"""Options of a recipe as a person types them: ``name=value``."""

import json
from collections.abc import Iterable
from typing import Any

from subquad.convert.recipes import recipe


def parse_options(to: str, given: Iterable[str]) -> dict[str, Any]:
    """Options of recipe ``to`` by name, from ``name=value``; values are numbers, words, ``true``/``false`` or lists.

    Raises:
        ValueError: an unknown recipe or option, or one without a value.

    Example:
        >>> parse_options("liger", ["window=32", "mix=[0.25, 0.75]", "gate=scalar"])
        {'window': 32, 'mix': [0.25, 0.75], 'gate': 'scalar'}
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise ValueError(f"an option is name=value, as in window=64; got {text!r}")
        options[name.strip()] = _value(value.strip())
    recipe(to).checked(options)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
