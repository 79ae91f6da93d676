"""The command line. Every command is a call that can be made from Python; here arguments are read and results shown."""

import os

from subquad.cli import looking_up, measuring, pretrained, training
from subquad.cli.application import app

__all__ = ["app", "looking_up", "main", "measuring", "pretrained", "training"]

#: As ``subquad --help`` lists them.
ORDER = ("compare", "claims", "bench", "analyze", "train", "generate", "convert", "sparsity", "rectify", "doctor")
app.registered_commands.sort(key=lambda command: ORDER.index(command.callback.__name__ if command.callback else ""))


def main() -> None:
    """The entry point of the ``subquad`` command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
