"""Every example of the documentation is run, every command is parsed, every name is looked up."""

import contextlib
import importlib
import io
import re
import shlex

import pytest
import torch
import typer

from subquad.cli import app
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands, name

ROOMS = "bench|blocks|catalog|claims|evaluation|feedforward|layers|mixers|models|ops|positions|tasks|training"
DOTTED = re.compile(rf"`(?:subquad\.)?({ROOMS})\.(?!py`)([A-Za-z_][A-Za-z_.]*[A-Za-z_])")


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name)
def test_examples_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch):
    """The blocks of a page share a namespace. A title "needs ..." says why a block cannot run everywhere."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "example"}
    listed = [block for block in blocks(page) if block.language in ("python", "text")]
    for block, following in zip(listed, [*listed[1:], None]):
        if block.language != "python" or block.title.startswith(("needs ", "src/", "tests/")):
            continue  # the files of CONTRIBUTING are carried out by test_contributing.py
        printed = run(block, name(page), namespace)
        if following is not None and following.title == "output":
            assert printed.strip() == following.text.strip(), f"{name(page)}, line {block.line}"


def run(block: Block, page: str, namespace: dict) -> str:
    source = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own lines
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, page, "exec"), namespace)
    return printed.getvalue()


COMMANDS = [(name(page), line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), [c for c in COMMANDS if c[1].startswith("subquad ")])
def test_commands_parse(page, line):
    """Names of commands and options, and the kind of every value; nothing is carried out."""
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="subquad")
    while hasattr(command, "commands"):
        assert "".join(words[:1]) in command.commands, f"{page}: no command {words[:1]} in {line!r}"
        command, words = command.commands[words[0]], words[1:]
    with contextlib.suppress(typer.Exit):  # --help
        command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize(("page", "line"), [c for c in COMMANDS if c[1].startswith("make ")])
def test_make_targets_exist(page, line):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(shlex.split(line, comments=True)[1:]) <= set(targets), page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_in_running_text_exist(page):
    for room, path in DOTTED.findall(page.read_text(encoding="utf-8")):
        thing = importlib.import_module(f"subquad.{room}")
        for part in path.split("."):
            if not hasattr(thing, part):  # a module that nothing has imported yet
                thing = importlib.import_module(f"{thing.__name__}.{part}")
            else:
                thing = getattr(thing, part)


def test_every_configuration_field_is_described():
    from subquad import SubquadConfig

    text = (ROOT / "docs" / "language-model.md").read_text(encoding="utf-8")
    inherited = {"model_type", "keys_to_ignore_at_inference"}
    for field in set(SubquadConfig.__annotations__) - inherited:
        rows = [line for line in text.splitlines() if line.startswith("|") and f"`{field}`" in line]
        assert rows, f"docs/language-model.md does not describe {field}"
        default = getattr(SubquadConfig, field)
        shown = {f"`{default!r}`", f"`{default}`", f'`"{default}"`'}
        assert any(form in rows[0] for form in shown), f"{field}: {rows[0]}; the default is {default!r}"
