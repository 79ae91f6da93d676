"""What a function or method is known by: a digest of its source, so that ours replaces only what it was written for."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def digest(function: Callable[..., Any]) -> str | None:
    """Sixteen hexadecimal digits of a function's source without decorators, docstring, annotations and layout.

    What wraps it is looked through (see :func:`wrapped_only_by`). None where there is no source to read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.decorator_list, definition.returns = [], None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:16]


def wrapped_only_by(package: str, function: Callable[..., Any]) -> bool:
    """Whether every wrapper around a function, and the function itself, was defined in a module of ``package``."""
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith(f"{package}."):
            return False
        function = getattr(function, "__wrapped__", None)  # type: ignore[assignment]
    return True
