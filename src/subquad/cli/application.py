"""What all commands share: the application, its two consoles, and how arguments are read and errors answered."""

import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Sequence models whose cost does not grow with the square of their input: train, run and compare them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
catalog_app = typer.Typer(help="What the library holds: 70 systems and what they stand on.", no_args_is_help=True)
app.add_typer(catalog_app, name="catalog")
console, errors = Console(), Console(stderr=True)

DataPaths = Annotated[
    list[Path],
    typer.Option("--data", help="A text file, a folder of them, or a JSONL file; may be given several times."),
]


def answers_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong input is answered with its sentence and exit code 2; ``SUBQUAD_DEBUG=1`` shows where it was raised."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ArithmeticError, ImportError) as error:
            if os.environ.get("SUBQUAD_DEBUG") == "1":
                raise
            errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error

    return run


def escape(text: str) -> str:
    return text.replace("[", r"\[")


def refuse_existing(folder: Path) -> None:
    """Raises ValueError where something stands already: a command that takes minutes says so at its beginning."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a folder that does not, or remove it")


def list_of(text: str, kind: type = str) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"a list of {kind.__name__} with commas between is needed; got {text!r}") from error


def causal_mixers(text: str) -> list[str]:
    """Names with commas between, or for 'all' every mixer that a causal language model can be made of."""
    from subquad.mixers import Pattern, available

    if text.strip() != "all":
        return list_of(text)
    causal = available(Pattern.CAUSAL_SELF)
    others = [name for name in available() if name not in causal]
    if others:
        errors.print(f"left out, without a causal form: {', '.join(others)}", highlight=False)
    return causal


COUNTS = {"k": 1e3, "K": 1e3, "M": 1e6, "m": 1e6, "": 1}


def quantity(text: str, units: dict[str, float], example: str) -> float:
    """A number with a unit behind it; a bare number is in the smallest unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2] if match else None
    if match is None or (unit not in units and unit != ""):
        raise ValueError(f"cannot read {text!r}; give a number and a unit, as in {example}")
    return float(match[1]) * units.get(unit or "", 1)
