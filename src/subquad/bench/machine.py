"""The machine and the software that figures were measured with."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("subquad", "torch", "numpy", "scipy", "numba", "transformers", "accelerate")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, BLAS, GPU, and the backend setting."""
    return {
        "processor": processor_name(),
        "cores": available_cores(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "blas": blas_libraries(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend": os.environ.get("SUBQUAD_BACKEND", "auto"),
    }


def blas_libraries() -> list[str]:
    """The BLAS libraries of this process and the matrix kernels they run, scipy's among them."""
    import scipy.linalg.blas  # noqa: F401  (loads the library that is asked about)
    from threadpoolctl import threadpool_info

    return [
        f"{pool['internal_api']} {pool.get('version')} {pool.get('architecture', '')}".strip()
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    ]


def describe_versions() -> dict[str, str]:
    """Python and the packages that figures depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def available_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's model, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows tells it in another way
        return None
