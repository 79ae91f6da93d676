"""The machine a benchmark ran on, as it stands in every results file, and how a results file is written."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Processor, cores, versions, threads, and which matrix kernels scipy's BLAS runs."""
    import numba
    import scipy.linalg.blas  # noqa: F401  (loads the library that is asked about)
    import transformers
    from threadpoolctl import threadpool_info

    processor = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "transformers": transformers.__version__,
        "blas": sorted(
            {f"{p['internal_api']} {p.get('architecture')}" for p in threadpool_info() if p["user_api"] == "blas"}
        ),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes ``results/name.json`` whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": describe(), **content}, indent=1) + "\n")
    os.replace(partial, path)
    return path
