"""A user's own texts: files, folders, JSON lines and saved ``datasets`` folders, as :class:`subquad.tasks.TextData`.

Whatever cannot be read as text is an error that names the file and the place in it.
"""

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .contract import SPLITS
from .text import TextData

_TEXT_SUFFIXES = """
    .txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .csv .tsv .log .srt .jsonl .json .yaml .yml .toml .ini
    .py .pyi .ipynb .js .ts .jsx .tsx .java .kt .scala .c .h .cc .cpp .hpp .cs .go .rs .rb .php .pl .lua .r .jl .swift
    .hs .cfg .ml .sh .sql .css
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
"""What is read of a folder; a file named by itself is read whatever its suffix."""


def text_files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> TextData:
    """The text of one path or several, split about 90/5/5 by document (see :meth:`TextData.from_documents`).

    Args:
        paths: of each, by its kind:

            - a file: one UTF-8 document, kept byte for byte. A single file, or a few large ones, cannot be split by
              document and are cut by position: the first 90% train, the next 5% validate, the last 5% test, so that
              the text around the cuts is near in time and subject (``split_by`` tells).
            - a ``.jsonl`` file: one document per line, the field "text" of the object, or its only string field.
            - a folder: every file below it with a text suffix (:data:`TEXT_SUFFIXES`), sorted by path, hidden names
              excepted.
            - a folder that ``datasets`` saved (``save_to_disk``): one document per row, "text" or the only string
              column. If it is given alone and has splits train, validation (or valid) and test, these are kept.

    Raises:
        FileNotFoundError: there is no such path; names the nearest name beside it.
        ValueError: no or too little text; a NUL byte or invalid UTF-8 (file and byte offset); a bad line of JSON
            (its number).
        ModuleNotFoundError: a saved data set, and the package ``datasets`` is not installed.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise ValueError("text_files needs at least one path; got none")
    places = [_existing(Path(path)) for path in paths]
    source = ", ".join(map(str, places[:3])) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    if len(places) == 1 and _is_saved_dataset(places[0]):
        splits = _dataset_documents(places[0])
        if splits.keys() >= set(SPLITS):
            return TextData.from_splits({split: b"\0".join(splits[split]) for split in SPLITS}, source)
    return TextData.from_documents([document for place in places for document in _documents(place)], source)


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    names = sorted(entry.name for entry in folder.iterdir())
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    hint = f"; did you mean {str(folder / nearest[0])!r}?" if nearest else f"; {folder} is empty"
    raise FileNotFoundError(f"there is no {str(path)!r}{hint}")


def _documents(place: Path) -> list[bytes]:
    if _is_saved_dataset(place):
        return [document for documents in _dataset_documents(place).values() for document in documents]
    if place.is_dir():
        return _folder_documents(place)
    return _jsonl_documents(place) if place.suffix == ".jsonl" else [_read_text(place)]


def _folder_documents(folder: Path) -> list[bytes]:
    files: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            if not name.startswith("."):
                place = Path(parent, name)
                (files if place.suffix.lower() in TEXT_SUFFIXES else others).append(place)
    if not files:
        found = f"it has {len(others)} others, such as {others[0].name!r}" if others else "it has no files"
        raise ValueError(f"{folder} has no file with a text suffix (.txt, .md, .py, .jsonl, ...); {found}")
    return [document for place in sorted(files) for document in _documents(place)]


def _read_text(place: Path) -> bytes:
    content = place.read_bytes()
    nul = content.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{place} is not UTF-8 text: byte {nul} is NUL (is it binary, or UTF-16?)")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x} ({error.reason})"
        ) from None
    return content


def _jsonl_documents(place: Path) -> list[bytes]:
    documents = []
    for number, line in enumerate(_read_text(place).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be a JSON object with a field 'text'; it is {type(row).__name__}")
        documents.append(_encoded(row[_text_field(row, where)], where))
    return documents


def _text_field(row: dict[str, Any], where: str) -> str:
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"{where}: 'text' must be a string; it is {type(row['text']).__name__}")
        return "text"
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise ValueError(
            f"{where} needs a field 'text' or exactly one string field; its fields are "
            f"{', '.join(map(repr, row)) or 'none'}, of them strings {', '.join(map(repr, strings)) or 'none'}"
        )
    return strings[0]


def _encoded(text: str, where: str) -> bytes:
    if "\0" in text:
        raise ValueError(f"{where}: character {text.index(chr(0))} of the text is NUL, which separates documents here")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} of the text is half of a surrogate pair") from None


def _is_saved_dataset(place: Path) -> bool:
    one_split = (place / "state.json").is_file() and (place / "dataset_info.json").is_file()
    return one_split or (place / "dataset_dict.json").is_file()


def _dataset_documents(place: Path) -> dict[str, list[bytes]]:
    """The documents of each split of a saved data set; "all" where it has none."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{place} is a saved data set; reading it needs the package 'datasets': pip install datasets"
        ) from None

    loaded = datasets.load_from_disk(str(place))
    splits = loaded if isinstance(loaded, dict) else {"all": loaded}
    found = {}
    for name, table in splits.items():
        where = f"{place}, split {name!r}"
        kinds = {column: getattr(feature, "dtype", None) for column, feature in table.features.items()}
        strings = [column for column, kind in kinds.items() if kind in ("string", "large_string")]
        if "text" not in strings and len(strings) != 1:
            raise ValueError(
                f"{where} needs a string column 'text' or exactly one string column; its columns are "
                f"{', '.join(map(repr, table.column_names))}"
            )
        column = "text" if "text" in strings else strings[0]
        texts = [_encoded(text, f"{where}, row {i}") for i, text in enumerate(table[column]) if text]
        found["valid" if name == "validation" else name] = texts
    return found
