"""Mamba's scan and mixer beside transformers' fallback and mambapy's parallel scan; writes results/scans.json."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor, nn

from subquad import mixers, ops
from subquad.bench.kernels import best_seconds

ROUNDS = 5  # all take turns in each


def beside_transformers(length: int = 2048, dim: int = 256, states: int = 16) -> dict[str, Any]:
    """Mamba's mixer and its scan beside transformers' fallback, and mambapy's parallel scan if there is one.

    The fallback's backward pass takes time that grows with the square of the length: it is also timed at an eighth of
    it, and at the whole length only once.
    """
    from transformers import MambaConfig
    from transformers.models.mamba import modeling_mamba as theirs

    ours = mixers.build("mamba", dim, state_size=states).eval()
    peer = theirs.MambaMixer(MambaConfig(hidden_size=dim, state_size=states, num_hidden_layers=1), 0).eval()
    weights = ours.state_dict()
    peer.load_state_dict({**weights, "conv1d.weight": weights["conv1d.weight"][:, None]})
    scan = getattr(theirs.mamba_selective_scan, "__wrapped__", theirs.mamba_selective_scan)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, dim, generator=generator)
    u, delta = torch.randn(2, 1, length, 2 * dim, generator=generator)
    B, C = torch.randn(2, 1, length, states, generator=generator)
    delta, A = 0.1 * delta.sigmoid(), -torch.arange(1.0, states + 1).repeat(2 * dim, 1)
    transposed = [t.mT.contiguous() for t in (u, delta, B, C)]

    def backward(mixer: Callable[[Tensor], Any], tokens: Tensor) -> Callable[[], None]:
        def run() -> None:
            y = mixer(tokens.detach().requires_grad_())
            y = y if isinstance(y, Tensor) else y.output
            y.sum().backward()

        return run

    products = [
        nn.Linear(dim, 4 * dim, False),
        peer.x_proj,
        nn.Linear(peer.time_step_rank, 2 * dim, False),
        peer.out_proj,
    ]
    widths = [dim, 2 * dim, peer.time_step_rank, 2 * dim]
    inputs = [torch.randn(1, length, width) for width in widths]

    def projections() -> None:
        for product, tokens in zip(products, inputs, strict=True):
            product(tokens)

    runs: dict[str, Callable[[], object]] = {
        "mixer": partial(ours, x),
        "projections": projections,
        "transformers_mixer": partial(peer, x),
        "scan": partial(ops.selective_scan, u, delta, A, B, C),
        "transformers_scan": partial(scan, transposed[0], transposed[1], A, transposed[2], transposed[3]),
    }
    pscan = _mambapy_scan()
    if pscan is not None:

        def parallel() -> Tensor:
            decay, write = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
            return (pscan(decay, write) @ C[..., None])[..., 0]

        runs["mambapy_scan"] = parallel
    seconds = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        y, expected = ours(x).output, peer(x)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                seconds[name] = min(seconds[name], best_seconds(run, repeats=2))
    seconds["mixer_both"] = best_seconds(backward(ours, x))
    both, started = backward(peer, x), time.perf_counter()
    both()
    seconds["transformers_mixer_both"] = time.perf_counter() - started
    short = x[:, : length // 8]
    seconds["mixer_both_at_an_eighth"] = best_seconds(backward(ours, short))
    seconds["transformers_mixer_both_at_an_eighth"] = best_seconds(backward(peer, short), repeats=1)
    return {
        "time": length,
        "dim": dim,
        "states": states,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "largest_relative_difference": float((y - expected).abs().max() / expected.abs().max()),
    }


def _mambapy_scan() -> Callable[[Tensor, Tensor], Tensor] | None:
    """mambapy's parallel scan where ``make peers`` put it."""
    sys.path.append(str(Path(__file__).parents[1] / ".peers"))
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None
    return pscan  # type: ignore[no-any-return]


def main() -> None:
    torch.set_num_threads(2)
    rows = [beside_transformers()]
    print(rows)
    print(machine.write("scans", {"command": " ".join(["python", *sys.argv]), "mamba": rows}))


if __name__ == "__main__":
    main()
