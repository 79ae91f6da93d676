"""What works here: packages, backends, threads and BLAS, and every kernel held against its definition."""

import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad import mixers, ops
from subquad.bench.machine import blas_libraries
from subquad.kernels import backends
from subquad.mixers.contract import Mixer, Request

TOLERANCE = 1e-4  # of the largest value, float32 against float64


@dataclass(frozen=True)
class Finding:
    """One line of the report: whether it is well, and what to do where it is not."""

    subject: str
    state: str  # "ok", "note" or "problem"
    text: str


def environment() -> list[Finding]:
    """Versions, devices, threads, BLAS and the settings that matter for speed."""
    findings = [
        Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"),
        Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    for package in ("transformers", "numba", "triton"):
        if importlib.util.find_spec(package) is None:
            state = "note" if package == "triton" else "problem"
            need = "GPU kernels need it: pip install triton" if package == "triton" else f"pip install {package}"
            findings.append(Finding(package, state, f"not installed; {need}"))
        else:
            findings.append(Finding(package, "ok", importlib.metadata.version(package)))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    findings.append(Finding("gpu", "ok" if gpu else "note", gpu or "none; everything runs on the CPU"))
    findings += _blas()
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        advice = "two OpenMP runtimes load; OMP_WAIT_POLICY=passive keeps them from spinning against each other"
        findings.append(Finding("OMP_WAIT_POLICY", "note", advice))
    for backend, device in (("cpu", "cpu"), ("gpu", "cuda")):
        reason = backends.obstacle(backend, torch.device(device), torch.float32)
        reason = reason or ("no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None)
        findings.append(Finding(f"backend {backend}", "note" if reason else "ok", reason or "can run"))
    return findings


def _blas() -> list[Finding]:
    """The matrix libraries loaded here: torch multiplies by one, our kernels by none, benchmarks compare with one."""
    found = [Finding("BLAS", "ok", library) for library in blas_libraries()]
    preset = os.environ.get("OPENBLAS_CORETYPE")
    if preset:
        advice = f"preset to {preset}: it may hide this processor's faster matrix kernels; unset it to compare"
        found.append(Finding("OPENBLAS_CORETYPE", "note", advice))
    return found


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _arguments() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    rows, width = (2, 100, 2), 32
    q, k, v = _draw(*rows, width), torch.nn.functional.normalize(_draw(*rows, width), dim=-1), _draw(*rows, width + 1)
    gate, head_gate, beta = -_draw(*rows, width).abs(), -_draw(*rows).abs(), 2 * torch.sigmoid(_draw(*rows))
    twice = (torch.stack([k, k], 2), torch.stack([v, -v], 2), torch.stack([beta, beta], 2))
    return {
        "linear_attention": (ops.linear_attention, (q, k, v)),
        "lightning_attention": (ops.lightning_attention, (q, k, v, torch.tensor([0.0, 0.5]))),
        "simple_gla": (ops.simple_gla, (q, k, v, head_gate)),
        "gla": (ops.gla, (q, k, v, gate)),
        "delta_rule": (ops.delta_rule, (q, k, v, beta)),
        "gated_delta_rule": (ops.gated_delta_rule, (q, k, v, head_gate, beta)),
        "kda": (ops.kda, (q, k, v, gate, beta)),
        "delta_product": (ops.delta_product, (q, *twice, head_gate)),
    }


def self_test(backend: str = "auto", device: str = "cpu") -> Iterator[tuple[Finding, float]]:
    """Every kernel, forward and backward, against the float64 definition; yields a finding and its seconds.

    The first run of a kernel compiles it; that is what ``subquad doctor --compile`` is for.
    """
    for name, (op, arguments) in _arguments().items():
        started = time.perf_counter()
        try:
            error = _largest_error(op, arguments, backend, device)
        except Exception as failure:  # a broken installation may fail in any way: it is what this report is about
            yield Finding(name, "problem", f"{type(failure).__name__}: {failure}"), time.perf_counter() - started
            continue
        state = "ok" if error <= TOLERANCE else "problem"
        yield Finding(name, state, f"largest error {error:.1e} of the largest value"), time.perf_counter() - started


def step_test(dim: int = 32) -> Iterator[tuple[Finding, float]]:
    """Every one-token kernel of a mixer against the ordinary way; yields a finding and its seconds."""
    for name in mixers.available():
        if mixers.mixer_class(name).step is Mixer.step:
            continue
        mixer, started = mixers.build(name, dim, num_heads=2).eval(), time.perf_counter()
        x = _draw(2, 5, dim)
        with torch.no_grad():
            state = mixer(x, use_state=True).state
            stepped = mixer.step(x[:, :1], state, None)
            expected = mixer.mix(x[:, :1], None, Request(state=state, use_state=True)).output
        if stepped is None:
            finding = Finding(f"{name}, one token", "note", "no kernel serves it here; the ordinary way is taken")
        else:
            error = float((stepped.output - expected).abs().max() / expected.abs().max())
            state_word = "ok" if error <= TOLERANCE else "problem"
            finding = Finding(f"{name}, one token", state_word, f"largest error {error:.1e} of the largest value")
        yield finding, time.perf_counter() - started


def _largest_error(op: Callable[..., Any], arguments: tuple[Tensor, ...], backend: str, device: str) -> float:
    results = []
    for dtype, kind, place in ((torch.float64, "reference", "cpu"), (torch.float32, backend, device)):
        leaves = [x.to(place, dtype, copy=True).requires_grad_() for x in arguments]
        output, state = op(*leaves, return_state=True, backend=kind)
        (output.cos().sum() + state.sin().sum()).backward()
        results.append([output.detach(), state.detach(), *(x.grad for x in leaves)])
    pairs = [(a.double().cpu(), b) for b, a in zip(*results)]
    # a gradient that is one number per head sums terms of either sign over all tokens: its size is theirs
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)
