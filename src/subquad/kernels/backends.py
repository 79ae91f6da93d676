"""The choice of a backend, and nothing else: numba and triton are looked for here, and imported elsewhere."""

import difflib
import importlib.util
import os
from collections.abc import Mapping

import torch

BACKENDS = ("auto", "reference", "chunked", "cpu", "gpu")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = {package: importlib.util.find_spec(package) is not None for package in ("numba", "triton")}


def triton_interprets() -> bool:
    """True where Triton kernels run on the CPU, in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run tensors of this device and dtype; None where it can."""
    if backend in ("reference", "chunked"):
        return None
    if dtype not in KERNEL_DTYPES:
        return (
            f"it computes in float32 and takes float32, bfloat16 or float16 inputs, not {dtype}; use backend='chunked'"
        )
    if backend == "cpu":
        if device.type != "cpu":
            return f"its kernels run on a CPU; the tensors are on {device}"
        return None if INSTALLED["numba"] else "numba is not installed"
    if not INSTALLED["triton"]:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and not triton_interprets():
        return f"its kernels run on a CUDA device; the tensors are on {device}"
    return None


def resolve(
    backend: str, device: torch.device, dtype: torch.dtype, unsupported: Mapping[str, str] | None = None
) -> str:
    """The backend that runs: ``backend`` itself, or for ``"auto"`` the fastest that can.

    Args:
        backend: one of ``BACKENDS``. ``"auto"`` is replaced by the environment variable ``SUBQUAD_BACKEND`` if set.
        device, dtype: those of the inputs.
        unsupported: backends that cannot run this call for a reason of its own, with the reason.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot run these inputs (with the reason).
    """
    if backend == "auto":
        backend = os.environ.get("SUBQUAD_BACKEND", "auto")
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}{hint}")
    unsupported = unsupported or {}
    if backend == "auto":
        fastest = "gpu" if device.type == "cuda" else "cpu"
        possible = fastest not in unsupported and obstacle(fastest, device, dtype) is None
        return fastest if possible else "chunked"
    reason = unsupported.get(backend) or obstacle(backend, device, dtype)
    if reason:
        raise ValueError(f"backend {backend!r} cannot run this call: {reason}")
    return backend


def check_values() -> bool:
    """Whether values (not only shapes) are checked on a GPU too; on a CPU they always are."""
    return os.environ.get("SUBQUAD_CHECK") == "1"
