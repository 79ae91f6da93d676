"""The record of a run: ``metrics.jsonl``, the same as a table in ``metrics.csv``, and TensorBoard events.

One record per step. The files hold nothing that a clock decides, so that those of a resumed run equal those of an
uninterrupted one byte for byte; speed goes to TensorBoard and to the progress display.
"""

import importlib.util
import json
import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

from .checkpoint import flush_to_disk, write_atomically

Record = dict[str, Any]


class MetricsLog:
    """Appends records, in memory (``history``) and in ``folder``.

    Args:
        folder: where the files go; None keeps the record in memory only.
        resumed_step: records after this step, which a killed run may have left, are dropped, as is a torn last line.
        tensorboard: also write events, where the package is installed.

    Raises:
        OSError: a file cannot be written; the line that could not be written whole is taken back.
    """

    def __init__(self, folder: Path | None, *, resumed_step: int = 0, tensorboard: bool = False) -> None:
        self.folder = folder
        self.history: list[Record] = []
        self.columns: list[str] = ["step"]
        self._events: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.history = _truncate(folder / "metrics.jsonl", resumed_step)
        for record in self.history:
            self._add_columns(record)
        self._write_table()
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(folder / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
            )

    def write(self, step: int, values: dict[str, float], speeds: dict[str, float] | None = None) -> None:
        """Records ``values`` of one step; ``speeds`` are for TensorBoard alone."""
        record = {"step": step, **values}
        if self.folder is not None:
            _append(self.folder / "metrics.jsonl", json.dumps(record) + "\n")
        self.history.append(record)
        if self.folder is not None:
            if self._add_columns(record):
                self._write_table()
            else:
                _append(self.folder / "metrics.csv", self._row(record))
        if self._events is not None:
            for name, value in {**values, **(speeds or {})}.items():
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flushes the files to the disk: called before a checkpoint that counts on them."""
        if self.folder is not None:
            for name in ("metrics.jsonl", "metrics.csv"):
                flush_to_disk(self.folder / name)
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _add_columns(self, record: Record) -> bool:
        added = [name for name in record if name not in self.columns]
        self.columns.extend(added)
        return bool(added)

    def _row(self, record: Record) -> str:
        return ",".join(_cell(record.get(name, "")) for name in self.columns) + "\n"

    def _write_table(self) -> None:
        assert self.folder is not None
        text = ",".join(map(_cell, self.columns)) + "\n" + "".join(map(self._row, self.history))
        path = self.folder / "metrics.csv"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def read_metrics(folder: str | Path) -> list[Record]:
    """The records in ``folder/metrics.jsonl``, one dictionary per recorded step."""
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _cell(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\n') else text


def _append(path: Path, line: str) -> None:
    data = line.encode("utf-8")
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            written = file.write(data)
            if written != len(data):
                file.write(data[written:])
        except OSError as error:
            os.ftruncate(file.fileno(), start)
            raise OSError(
                f"a record could not be added to {path}: {error.strerror}; the records before it are whole"
            ) from error


def _truncate(path: Path, last_step: int) -> list[Record]:
    """Cuts the file after the last whole record up to ``last_step``, and returns the records that stay."""
    records: list[Record] = []
    end = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            try:
                record = json.loads(line)
                step = record["step"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n") or step > last_step:
                break
            records.append(record)
            end += len(line)
        file.truncate(end)
    steps = [0] + [record["step"] for record in records]
    gap = max((after - before for before, after in pairwise(steps)), default=1)
    if last_step - steps[-1] > gap:
        warnings.warn(f"{path} ends at step {steps[-1]}, but the run resumes after step {last_step}", stacklevel=4)
    return records
