"""The machine a benchmark ran on, as it stands in every results file, and how a results file is written."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from subquad.bench.machine import describe_machine, describe_versions
from subquad.training.checkpoint import write_atomically

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Date, machine, versions, instruction set of torch's kernels, and a preset that hides faster BLAS kernels."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        **describe_machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "versions": describe_versions(),
    }


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes ``results/name.json`` whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"machine": describe(), **content}, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path
