"""Whether speed stays constant as sequences grow: tokens per second and bytes per token against the length.

The measurement of Qin et al. 2024 ("Various Lengths, Constant Speed"), section 5: a fixed number of tokens per step,
in fewer and longer rows, forward and backward.
"""

import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from subquad.mixers import Mixer

Step = Callable[[], Any]
Preparation = Callable[[int, int], Step]


@dataclass(frozen=True)
class Speed:
    """One length: seconds of a step (the median), and the most bytes that one held at once, per token.

    ``bytes_per_token`` counts what the step allocates, not its inputs; None where it was not asked for.
    """

    length: int
    batch: int
    seconds: float
    bytes_per_token: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.length / self.seconds


@dataclass(frozen=True)
class SpeedTable:
    """Speeds by length, and how they change.

    Attributes:
        rows: shortest length first.
        exponent: p of the fit ``seconds per token ~ length^p`` by least squares of the logarithms: 0 is constant speed,
            1 is a cost that grows with the square of the length.
    """

    rows: tuple[Speed, ...]
    exponent: float

    def table(self) -> Table:
        """For a rich console."""
        table = Table(caption=f"time per token ~ length^{self.exponent:.2f}", caption_justify="left")
        for column in ("length", "batch", "ms per step", "tokens/s", "bytes/token"):
            table.add_column(column, justify="right")
        for row in self.rows:
            held = "-" if row.bytes_per_token is None else f"{row.bytes_per_token:,.0f}"
            table.add_row(
                f"{row.length:,}", str(row.batch), f"{1e3 * row.seconds:.2f}", f"{row.tokens_per_second:,.0f}", held
            )
        return table


def constant_speed(
    subject: nn.Module | Preparation,
    lengths: Sequence[int],
    *,
    tokens: int | None = None,
    repeats: int = 5,
    backward: bool = True,
    memory: bool = True,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedTable:
    """Times a mixer, a language model or any step at several lengths, all in one process.

    Every length runs once unmeasured (compilation, first touches); then the lengths take turns, so that a disturbance
    falls on all of them, and the median of ``repeats`` counts.

    Args:
        subject: a mixer; a causal language model (its loss over random tokens); or ``prepare(batch, length) -> step``,
            whose ``step()`` is what is timed.
        lengths: two or more different lengths T.
        tokens: per step, a multiple of every length; None: one row of each length.
        repeats: measurements per length.
        backward: whether a mixer or model is also differentiated.
        memory: whether to measure bytes per token, in one further step at each length.
        seed: of the inputs.
        clock: seconds; another one for tests.

    Raises:
        ValueError: fewer than two lengths, tokens that a length does not divide.
        TypeError: a subject of another kind.

    Example:
        >>> from subquad import mixers
        >>> speeds = constant_speed(mixers.build("lightning", 32, num_heads=2), [32, 64], tokens=64, repeats=1)
        >>> [(row.length, row.batch) for row in speeds.rows]
        [(32, 2), (64, 1)]
    """
    lengths = sorted(set(lengths))
    if len(lengths) < 2 or lengths[0] < 1:
        raise ValueError(f"lengths must be two or more different numbers >= 1; got {lengths}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    for length in lengths:
        if tokens is not None and tokens % length:
            raise ValueError(f"tokens must be a multiple of every length; {tokens} is not one of {length}")
    prepare = _preparation(subject, backward, seed)
    batches = [1 if tokens is None else tokens // length for length in lengths]
    steps = [prepare(batch, length) for batch, length in zip(batches, lengths)]
    device = _device(subject)
    for step in steps:
        step()
    seconds: list[list[float]] = [[] for _ in lengths]
    for _ in range(repeats):
        for step, measured in zip(steps, seconds):
            _wait(device)
            started = clock()
            step()
            _wait(device)
            measured.append(clock() - started)
    held = [_peak_bytes(step, device) if memory else None for step in steps]
    rows = tuple(
        Speed(length, batch, statistics.median(measured), None if peak is None else peak / (batch * length))
        for length, batch, measured, peak in zip(lengths, batches, seconds, held)
    )
    per_token = [row.seconds / (row.batch * row.length) for row in rows]
    exponent = float(np.polyfit(np.log(lengths), np.log(per_token), 1)[0])
    return SpeedTable(rows, exponent)


def attention_preparation(num_heads: int, head_dim: int, backward: bool, seed: int) -> Preparation:
    """Steps of torch's causal ``scaled_dot_product_attention`` on its best layout, contiguous ``(B, H, T, K)``: the
    peer that an op with ``(B, T, H, K)`` inputs is timed beside."""

    def prepare(batch: int, length: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        shape = (3, batch, num_heads, length, head_dim)
        inputs = [x.clone().requires_grad_(backward) for x in torch.randn(shape, generator=generator)]
        return op_step(lambda: nn.functional.scaled_dot_product_attention(*inputs, is_causal=True), inputs, backward)

    return prepare


def op_step(op: Callable[[], Tensor], inputs: Sequence[Tensor], backward: bool) -> Step:
    """A step that calls ``op()`` and, with ``backward``, differentiates the sum of its output for ``inputs``."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                op()

        return forward

    def both() -> None:
        output = op()
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    return both


def mixer_preparation(mixer: Mixer, seed: int, *, backward: bool = True) -> Preparation:
    """Steps of a mixer on normal inputs."""
    weight = next(mixer.parameters())
    trained = [parameter for parameter in mixer.parameters() if parameter.requires_grad]

    def prepare(batch: int, length: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, length, mixer.dim, generator=generator).to(weight).requires_grad_(backward)
        return op_step(lambda: mixer(x).output, [x, *trained], backward)

    return prepare


def language_model_preparation(model: Any, seed: int, *, backward: bool = True) -> Preparation:
    """Steps of a causal language model: its loss over random tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def prepare(batch: int, length: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)
        return op_step(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, trained, backward)

    return prepare


def _preparation(subject: nn.Module | Preparation, backward: bool, seed: int) -> Preparation:
    if isinstance(subject, Mixer):
        return mixer_preparation(subject, seed, backward=backward)
    if isinstance(subject, nn.Module) and hasattr(getattr(subject, "config", None), "vocab_size"):
        return language_model_preparation(subject, seed, backward=backward)
    if callable(subject) and not isinstance(subject, nn.Module):
        return subject
    raise TypeError(
        "subject must be a mixer, a causal language model or a function (batch, length) -> step; "
        f"got {type(subject).__name__}"
    )


def _device(subject: nn.Module | Preparation) -> torch.device:
    parameter = next(subject.parameters(), None) if isinstance(subject, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that a step held at once, beyond those before it.

    On a CPU the peak of torch's allocator plus that of Python's, which numpy reports to (the results of numba kernels):
    an upper bound of the peak of both together.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library reports itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        tracemalloc.start()
        try:
            step()
            arrays = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # every allocation and release is an event; the order in which they are kept is not that of time
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + arrays
