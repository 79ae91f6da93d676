"""Recorded verdicts: a JSON file of what was measured last, by slug, which later runs are compared with."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from subquad.claims.contract import ClaimResult
from subquad.training.checkpoint import write_atomically

LEAST_SEEDS = 2


def read_records(path: str | Path) -> dict[str, dict[str, Any]]:
    """The records in the file, by slug; none where there is no file.

    Raises:
        ValueError: the file is not one that :func:`write_record` wrote.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["claims"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of recorded claims: {error}") from error
    if not isinstance(records, dict):
        raise ValueError(f"{path} is not a file of recorded claims: 'claims' holds a {type(records).__name__}")
    return records


def write_record(path: str | Path, result: ClaimResult) -> None:
    """Puts the result into the file, beside those of other claims; the file is replaced whole or not at all.

    Raises:
        ValueError: fewer than two seeds, which record nothing, or a file of another kind in its place.
        OSError: the file cannot be written; what it held stays.
    """
    if len(result.seeds) < LEAST_SEEDS:
        raise ValueError(f"a record needs {LEAST_SEEDS} seeds or more; this result has {result.seeds}")
    path = Path(path)
    records = read_records(path)
    records[result.claim.slug] = {**result.record(), "machine": _machine()}
    ordered = dict(sorted(records.items(), key=lambda item: item[1]["number"]))
    text = json.dumps({"claims": ordered}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
