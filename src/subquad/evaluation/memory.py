"""Peak memory of a computation: the process's resident set on a CPU, allocated memory on a GPU.

A high-water mark belongs to a process and never falls by itself. Measure one model per process, lengths ascending.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had.

    Raises:
        OSError: the system does not tell (Windows).
    """
    if STATUS.exists():  # not getrusage: its figure is inherited from the process that started this one
        return _status_bytes("VmHWM")
    try:
        import resource
    except ImportError:
        raise OSError(f"peak memory cannot be read on {sys.platform}") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident set of this process now; where the system does not tell, its largest so far."""
    return _status_bytes("VmRSS") if STATUS.exists() else peak_resident_bytes()


def restart_peak() -> None:
    """Lets the high-water mark start again from the present resident set, where the system can (Linux)."""
    if STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # a container may forbid it; then the mark is that of the whole process


@torch.no_grad()
def prefill_memory(model: Any, lengths: Iterable[int]) -> dict[int, int]:
    """Peak memory of reading a context, above what is held before: bytes by length.

    Args:
        model: a Subquad causal language model in evaluation mode.
        lengths: contexts in tokens, ascending.

    Raises:
        ValueError: lengths that do not ascend: a mark that never falls would hide the smaller one.
        OSError: the system does not tell.
    """
    lengths = list(lengths)
    if lengths != sorted(set(lengths)):
        raise ValueError(f"lengths must ascend; got {lengths}")
    device = next(model.parameters()).device
    read = _reader(model, device)
    read(64)  # kernels load, pools start
    peaks: dict[int, int] = {}
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        for length in lengths:
            torch.cuda.reset_peak_memory_stats(device)
            read(length)
            peaks[length] = torch.cuda.max_memory_allocated(device) - held
        return peaks
    restart_peak()
    held = resident_bytes()
    for length in lengths:
        read(length)
        peaks[length] = max(0, peak_resident_bytes() - held)
    return peaks


def _reader(model: Any, device: torch.device) -> Any:
    def read(length: int) -> None:
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        model(input_ids=tokens.to(device), use_cache=True, logits_to_keep=1)

    return read


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")
