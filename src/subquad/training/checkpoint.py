"""Checkpoints as folders that appear whole or not at all, and are checked when they are read.

A checkpoint is written into a hidden folder beside its place; every file and the folder are flushed to the disk, and
one rename makes it visible. ``checkpoint.json`` lists the files with their sizes and SHA-256 sums, so that damage is
noticed. Weights are in safetensors (shared tensors once); the optimizer's and scheduler's state is a torch file that
loads with ``weights_only=True``.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

WEIGHTS = "model.safetensors"
STATE = "state.pt"
MANIFEST = "checkpoint.json"
PREFIX = "step-"
WRITING = ".writing-"
REMOVING = ".removing-"


class CheckpointError(RuntimeError):
    """No usable checkpoint: what is there is damaged, or belongs to another model or run."""


class Checkpoint(NamedTuple):
    """A finished checkpoint: its step, its folder, and what ``checkpoint.json`` says beside the files (``details``)."""

    step: int
    path: Path
    details: dict[str, Any]


def write_checkpoint(
    folder: Path, step: int, model: nn.Module, state: dict[str, Any], details: dict[str, Any], *, keep: int
) -> Checkpoint:
    """Writes ``folder/step-NNNNNNNN`` and removes all but the newest ``keep`` checkpoints.

    Args:
        folder: holds the checkpoints of one run; created if needed.
        step: optimizer steps done.
        model: its ``state_dict`` is stored, tensors that share memory once.
        state: what ``torch.load(weights_only=True)`` can read back: optimizer, scheduler, scaler.
        details: what JSON can hold: options, data position.

    Raises:
        OSError: the disk is full, the folder cannot be written, ...: one sentence, the cause chained. Nothing of the
            new checkpoint remains and the earlier ones are as they were.
    """
    target = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f"{WRITING}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        _save_weights(model, temporary / WEIGHTS)
        with open(temporary / STATE, "wb") as file:
            torch.save(state, file)
        files = {}
        for name in (WEIGHTS, STATE):
            flush_to_disk(temporary / name)
            files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": _digest(temporary / name)}
        manifest = {"step": step, "files": files, "details": details}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush_to_disk(temporary / MANIFEST)
        flush_to_disk(temporary)
        if target.exists():  # damaged, or it would have been resumed from
            _remove(target)
        os.replace(temporary, target)
        flush_to_disk(folder)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = [path.name for path in finished(folder)] if folder.is_dir() else []
        intact = f"; {before[0]} is intact" if before else "; there is no earlier one"
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder}: {_reason(error)}{intact}"
        ) from error
    for path in finished(folder)[keep:]:
        _remove(path)
    return Checkpoint(step, target, json.loads(json.dumps(details)))


def finished(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first; unfinished ones are not among them."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def find_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; leftovers of interrupted writes are removed. None where there is none.

    A damaged one is passed over with a warning that names it.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    for pattern in (f"{WRITING}*", f"{REMOVING}*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)
    damaged = []
    for path in finished(folder):
        try:
            return read_manifest(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
            damaged.append(path.name)
    if damaged:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: {', '.join(damaged)}")
    return None


def read_manifest(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint folder.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} has {size} bytes, {entry['bytes']} were written"
                )
            if _digest(path / name) != entry["sha256"]:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} has changed since it was written")
        return Checkpoint(int(manifest["step"]), path, manifest["details"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {_reason(error)}") from error


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies the stored weights into ``model``.

    Raises:
        CheckpointError: the model has other tensors or other shapes.
    """
    stored = safetensors.torch.load_file(checkpoint.path / WEIGHTS)
    present, _ = _distinct_tensors(model)
    unfit = [name for name in present.keys() & stored.keys() if present[name].shape != stored[name].shape]
    for what, names in (
        ("lacks", stored.keys() - present.keys()),
        ("also has", present.keys() - stored.keys()),
        ("has other shapes for", unfit),
    ):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise CheckpointError(
                f"checkpoint {checkpoint.path} does not fit this {type(model).__name__}, which {what} {listed}"
            )
    model.load_state_dict(stored, strict=False)


def load_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``state`` that :func:`write_checkpoint` was given, on the CPU."""
    state: dict[str, Any] = torch.load(checkpoint.path / STATE, map_location="cpu", weights_only=True)
    return state


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file beside ``path``, flushes it and renames it to ``path``."""
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        write(temporary)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """``fsync`` of a file or, where the system can, of a folder (which makes its names durable)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the ``state_dict``, one that several names share under its first name; and later name -> first."""
    first_name: dict[tuple[object, ...], str] = {}
    tensors, aliases = {}, {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"state_dict entry {name!r} is a {type(tensor).__name__}: a checkpoint holds tensors only")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first_name:
            aliases[name] = first_name[place]
        else:
            first_name[place] = name
            tensors[name] = tensor
    return tensors, aliases


def _save_weights(model: nn.Module, path: Path) -> None:
    tensors, aliases = _distinct_tensors(model)
    for name, tensor in tensors.items():
        is_part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()
    safetensors.torch.save_file(tensors, path, metadata=aliases)


def _remove(path: Path) -> None:
    """Takes a checkpoint out of sight in one rename before deleting it, so that none is ever half there."""
    hidden = path.with_name(f"{REMOVING}{path.name}")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """The system's own words where an OSError lies under ``error``, else the first line of what ``error`` says."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0] or type(error).__name__
