"""Timings of ops beside torch's own attention, as ratios taken in one process: warm, best of several, peer at its best.

Peers get their best layout (contiguous heads-first tensors) and the same number of threads. All take turns, several
rounds of them: what slows a machine down for some seconds then spoils no single one.
"""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops

Call = Callable[[], list[Tensor]]
REPEATS, SHORTEST = 3, 0.3  # at least so many runs, and at least so many seconds of them


@dataclass(frozen=True)
class Timing:
    """One measurement: the op, its length, forward or both directions, seconds, and the ratio to torch's attention."""

    op: str
    time: int
    backward: bool
    threads: int
    seconds: float
    attention_seconds: float | None

    @property
    def ratio(self) -> float | None:
        """How many times faster than torch's causal attention; None where that was not run."""
        return None if self.attention_seconds is None else self.attention_seconds / self.seconds

    def record(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio}


def draw(
    time: int, heads: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of all ops at one length, batch 1: unit keys, decays of about 0.03 nats a token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rows = (1, time, heads)
    q, k, v = (normal(*rows, width) for _ in range(3))
    return {
        "q": q.to(dtype),
        "k": F.normalize(k, dim=-1).to(dtype),
        "v": v.to(dtype),
        "gate": F.logsigmoid(normal(*rows, width) + 2) / 4,
        "head_gate": F.logsigmoid(normal(*rows) + 2) / 4,
        "beta": torch.sigmoid(normal(*rows)),
        "slope": ops.lightning_slopes(heads).to(device),
    }


OPS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "linear_attention": lambda x: ops.linear_attention(x["q"], x["k"], x["v"])[0],
    "lightning_attention": lambda x: ops.lightning_attention(x["q"], x["k"], x["v"], x["slope"])[0],
    "simple_gla": lambda x: ops.simple_gla(x["q"], x["k"], x["v"], x["head_gate"])[0],
    "gla": lambda x: ops.gla(x["q"], x["k"], x["v"], x["gate"])[0],
    "delta_rule": lambda x: ops.delta_rule(x["q"], x["k"], x["v"], x["beta"])[0],
    "gated_delta_rule": lambda x: ops.gated_delta_rule(x["q"], x["k"], x["v"], x["head_gate"], x["beta"])[0],
    "kda": lambda x: ops.kda(x["q"], x["k"], x["v"], x["gate"], x["beta"])[0],
}


PEER = "torch's attention"


def torch_attention(x: dict[str, Tensor]) -> Tensor:
    """torch's causal attention on contiguous heads-first tensors, its fastest layout here."""
    return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)


def best_seconds(run: Callable[[], object], device: str = "cpu", repeats: int = REPEATS) -> float:
    """The shortest of several runs after one to warm up: at least ``repeats``, and ``SHORTEST`` seconds of them."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    run()
    wait()
    taken: list[float] = []
    while len(taken) < repeats or (sum(taken) < SHORTEST and len(taken) < 200):
        started = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - started)
    return min(taken)


def forward_and_backward(function: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> Callable[[], object]:
    """A call of both directions, every argument wanting its gradient, a fresh output each time."""
    leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
    weight = torch.ones_like(function(leaves))

    def run() -> object:
        output = function(leaves)
        used = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return torch.autograd.grad(output, used, weight, allow_unused=True)

    return run


def kernel_timings(
    names: Iterable[str] | None = None,
    lengths: Sequence[int] = (512, 2048, 8192),
    *,
    heads: int = 8,
    width: int = 64,
    threads: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    longest_attention: int = 16_384,
    rounds: int = 1,
    on_result: Callable[[Timing], None] | None = None,
) -> list[Timing]:
    """Times ops, forward alone and with backward, beside torch's causal attention of the same sizes.

    Args:
        names: of ops (keys of ``OPS``); None: all.
        lengths: tokens, batch 1.
        heads, width: H, and K = V.
        threads: for torch and our kernels alike; None leaves them as they are.
        device, dtype: where and in what.
        longest_attention: torch's attention is not run beyond it (its time grows with the square).
        rounds: how often all take their turn at one length; the best counts.
        on_result: called with each result as it comes.

    Returns:
        One :class:`Timing` per op, length and direction, in this order.
    """
    from subquad.layers.registry import unknown_name

    wanted = list(OPS) if names is None else list(names)
    for name in wanted:
        if name not in OPS:
            raise unknown_name("op", name, OPS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    results: list[Timing] = []
    try:
        for length in lengths:
            x = draw(length, heads, width, device, dtype)
            heads_first = {name: x[name].transpose(1, 2).contiguous() for name in ("q", "k", "v")}
            for backward in (False, True):
                best = dict.fromkeys((PEER, *wanted), float("inf"))
                for _ in range(rounds):
                    for name in best:
                        if name == PEER and length > longest_attention:
                            continue
                        function, inputs = (torch_attention, heads_first) if name == PEER else (OPS[name], x)
                        best[name] = min(best[name], _timed(function, inputs, backward, device))
                peer = best[PEER] if length <= longest_attention else None
                for name in wanted:
                    results.append(Timing(name, length, backward, torch.get_num_threads(), best[name], peer))
                    if on_result is not None:
                        on_result(results[-1])
                gc.collect()
    finally:
        torch.set_num_threads(before)
    return results


def _timed(function: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor], backward: bool, device: str) -> float:
    if backward:
        return best_seconds(forward_and_backward(function, x), device)
    with torch.no_grad():
        return best_seconds(lambda: function(x), device)


def matrix_product_rate(size: int = 1024) -> float:
    """Multiply-adds per second, times two, of scipy's BLAS (the fastest one at hand) on float32 squares of ``size``.

    It gets as many threads as torch has.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    from scipy.linalg.blas import sgemm

    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        return 2 * size**3 / best_seconds(lambda: sgemm(1.0, a.T, b.T))
