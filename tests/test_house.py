"""The house: imports point down only, no file grows past its room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "subquad"
FLOORS = [
    ("kernels",),
    ("ops",),
    ("layers", "positions"),
    ("mixers", "feedforward"),
    ("blocks",),
    ("models",),
    ("training",),
    ("evaluation",),
    ("convert", "compress", "inference"),
    ("bench",),
    ("claims",),
    ("cli",),
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ANYWHERE = {"catalog", "tasks"}  # data: strings, and generators that import nothing of ours
LAYERS_MAY_USE = {"layers", "positions"}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem == "blocks")


def room_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms of ours that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "subquad" else [f"subquad.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "subquad" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = room_of(path)
    for other in imported_rooms(path):
        if own == "tasks":
            assert other == "tasks", f"tasks imports nothing of ours, but {path} imports {other}"
        elif other not in ANYWHERE and other != own:
            assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which does not lie below it"


def test_a_model_imports_no_other_model():
    support = {"config", "presets", "cache", "checkpoints"}
    for path in (PACKAGE / "models").glob("*.py"):
        if path.stem in support or path.stem == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subquad.models."):
                assert node.module.split(".")[2] in support


def test_no_source_file_outgrows_its_room():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: lines for name, lines in long.items() if lines > 600} == {}
