"""The folder of a comparison: whose it is, and the small results that a continued one goes on from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subquad import tasks
from subquad.bench.comparison.results import write_text
from subquad.bench.comparison.settings import CompareSettings

WORK = "work"  # the part of the folder that a continued comparison goes on from


def open_folder(folder: Path, settings: CompareSettings, text: tasks.TextData, resume: bool) -> Path:
    """Makes the folder, or finds that it holds the beginning of the same comparison.

    Raises:
        ValueError: it holds another comparison (the differences are named), something else, or ``resume`` is false.
        OSError: it cannot be made.
    """
    mine = {"settings": settings.to_dict(), "text": text_identity(text)}
    record = folder / WORK / "settings.json"
    if not record.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something else than a comparison: give a new or empty folder")
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the folder {folder} cannot be made: {error.strerror}") from error
        write_text(record, json.dumps(mine, indent=1) + "\n")
        return folder
    if not resume:
        raise ValueError(f"{folder} already holds a comparison: pass resume=True to continue it, or another folder")
    stored = json.loads(record.read_text(encoding="utf-8"))
    differences = [f"{name} is {new!r} and was {old!r}" for name, new, old in _differences(mine, stored)]
    if differences:
        raise ValueError(f"{folder} holds a comparison that this one does not continue: {'; '.join(differences)}")
    return folder


def text_identity(text: tasks.TextData) -> dict[str, Any]:
    """What tells one text from another, whatever its files are called."""
    digest = hashlib.sha256()
    for split in ("train", "valid", "test"):
        digest.update(text.tokens(split).tobytes() + split.encode())
    return {"sha256": digest.hexdigest(), "vocab_size": text.vocab_size}


def _differences(new: dict[str, Any], old: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name in {**new, **old}:
        one, other = new.get(name), old.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{name}." if name != "settings" else prefix)
        elif one != other and name != "workers":
            found.append((prefix + name, one, other))
    return found


class Kept:
    """Small results under their names, one JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, default: Any = None) -> Any:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default

    def put(self, name: str, value: Any) -> None:
        write_text(self.folder / f"{name}.json", json.dumps(value, allow_nan=False))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is kept under this name, made and kept at the first call."""
        found = self.get(name)
        if found is None:
            found = make()
            self.put(name, found)
        return found
