"""Every op with a matrix state as one case: how to draw its arguments. A new op of this kind adds a case here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops

Draw = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """``arguments(shape, strength, seed)`` gives the arguments in float64; ``gates`` are those kept in float32."""

    op: Callable[..., tuple[Tensor, Tensor]]
    arguments: Draw
    head_axes: tuple[int, ...]  # the axis of heads in each argument
    gates: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    time: int = 33
    heads: int = 3
    key: int = 5
    value: int = 7
    updates: int = 2


def _qkv(s: Shape, seed: int) -> tuple[torch.Generator, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = (s.batch, s.time, s.heads)
    return generator, draw(*rows, s.key), draw(*rows, s.key), draw(*rows, s.value)


def _decay(generator: torch.Generator, strength: float, *shape: int) -> Tensor:
    """Log decay of -U(0, strength); one channel of the last axis is -100 at one step where there are several."""
    gate = -strength * torch.rand(*shape, generator=generator, dtype=torch.float64)
    if strength >= 40 and shape[-1] > 1:
        gate[:, shape[1] // 2, ..., 0] = -100.0
    return gate


def _beta(generator: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def _unit_keys(k: Tensor, strength: float) -> Tensor:
    """Unit keys; at strength 0 all the same, the hardest case of a triangular solve."""
    k = F.normalize(k, dim=-1)
    return k[:, :1].expand_as(k).clone() if strength == 0 else k


def _linear(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    return _qkv(s, seed)[1:]


def _lightning(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, k, v = _qkv(s, seed)
    slope = strength * torch.rand(s.heads, generator=generator, dtype=torch.float64)
    if strength >= 40:
        slope[0] = 60.0
    return q, k, v, slope


def _simple_gla(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, k, v = _qkv(s, seed)
    return q, k, v, _decay(generator, strength, s.batch, s.time, s.heads)


def _gla(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, k, v = _qkv(s, seed)
    return q, k, v, _decay(generator, strength, s.batch, s.time, s.heads, s.key)


def _delta(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, k, v = _qkv(s, seed)
    beta = _beta(generator, s.batch, s.time, s.heads)
    return q, _unit_keys(k, strength), v, torch.full_like(beta, 2.0) if strength == 0 else beta


def _gated_delta(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, k, v = _qkv(s, seed)
    gate = _decay(generator, strength, s.batch, s.time, s.heads)
    return q, _unit_keys(k, strength), v, gate, _beta(generator, s.batch, s.time, s.heads)


def _kda(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, k, v = _qkv(s, seed)
    gate = _decay(generator, strength, s.batch, s.time, s.heads, s.key)
    return q, _unit_keys(k, strength), v, gate, _beta(generator, s.batch, s.time, s.heads)


def _product(s: Shape, strength: float, seed: int) -> tuple[Tensor, ...]:
    generator, q, _, _ = _qkv(s, seed)
    rows = (s.batch, s.time, s.updates, s.heads)
    k = F.normalize(torch.randn(*rows, s.key, generator=generator, dtype=torch.float64), dim=-1)
    v = torch.randn(*rows, s.value, generator=generator, dtype=torch.float64)
    return q, k, v, _beta(generator, *rows), _decay(generator, strength, s.batch, s.time, s.heads)


CASES = {
    "linear_attention": Case(ops.linear_attention, _linear, (2, 2, 2)),
    "lightning_attention": Case(ops.lightning_attention, _lightning, (2, 2, 2, 0), gates=(3,)),
    "simple_gla": Case(ops.simple_gla, _simple_gla, (2, 2, 2, 2), gates=(3,)),
    "gla": Case(ops.gla, _gla, (2, 2, 2, 2), gates=(3,)),
    "delta_rule": Case(ops.delta_rule, _delta, (2, 2, 2, 2), gates=(3,)),
    "gated_delta_rule": Case(ops.gated_delta_rule, _gated_delta, (2, 2, 2, 2, 2), gates=(3, 4)),
    "kda": Case(ops.kda, _kda, (2, 2, 2, 2, 2), gates=(3, 4)),
    "delta_product": Case(ops.delta_product, _product, (2, 3, 3, 3, 2), gates=(3, 4)),
}
FLOOR = 1e-2
STRENGTHS = (0.0, 0.01, 3.0, 40.0)


def cast(case: Case, arguments: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments in ``dtype``, gates in float32 at least."""
    gate_dtype = torch.promote_types(dtype, torch.float32)
    return tuple(x.to(gate_dtype if i in case.gates else dtype) for i, x in enumerate(arguments))


def initial_state(s: Shape, seed: int, rows: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rows or s.batch, s.heads, s.key, s.value, generator=generator, dtype=torch.float64)


def run_with_gradients(case: Case, arguments: tuple[Tensor, ...], state: Tensor, **options: object) -> list[Tensor]:
    """Output, last state and the gradient of every argument and of the initial state, of one scalar of both."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    start = state.detach().clone().requires_grad_()
    output, last = case.op(*leaves, initial_state=start, return_state=True, **options)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ((weight * output).sum() + last.sin().sum()).backward()
    return [output.detach(), last.detach(), *(x.grad for x in leaves), start.grad]


def slope_terms(case: Case, arguments: tuple[Tensor, ...], state: Tensor) -> Tensor | None:
    """``sum_t |d loss / d log_decay_t|`` per head, for a constant decay: from the op with a gate per token."""
    if case.op is not ops.lightning_attention:
        return None
    q, k, v, slope = (x.double() for x in arguments)
    per_token = (q, k, v, -slope.expand(*q.shape[:3]))
    wide = Case(partial(ops.simple_gla, scale=1.0), CASES["simple_gla"].arguments, CASES["simple_gla"].head_axes)
    gradient = run_with_gradients(wide, per_token, state.double(), backend="reference")[5]
    return gradient.abs().sum(dim=(0, 1))


def assert_equal(
    actual: list[Tensor], expected: list[Tensor], bound: float, case: Case, slope_terms: Tensor | None = None
) -> None:
    """DESIGN's equality: per tensor and head, ``max|a-b| <= bound * max|b|``.

    The lists are those of :func:`run_with_gradients`, or the first two of them. A value is a
    sum of products of the others and carries their rounding, about 1e-6 of the largest, whatever it cancels to: with
    the bound 1e-4, sizes below 1e-2 of the largest value of all tensors (at least 1) count as that.

    The gradient of a slope is one number per head, the sum over all tokens of terms of either sign; each term may be
    wrong by its share of the bound, so their sum by the bound times the sum of their sizes, ``slope_terms``.
    """
    axes = (2, 1, *case.head_axes, 1)
    floor = FLOOR * max(1.0, *(float(b.abs().max()) for b in expected))
    for place, (a, b, axis) in enumerate(zip(actual, expected, axes)):
        assert a.shape == b.shape
        if b.ndim == 1:
            assert slope_terms is not None
            within = (a - b).abs() <= bound * slope_terms.clamp(min=floor)
            assert bool(within.all()), f"slope: {a.tolist()} for {b.tolist()}"
            continue
        others = [i for i in range(b.ndim) if i != axis]
        error, size = (a.double() - b.double()).abs(), b.double().abs()
        error, size = (x.amax(dim=others) if others else x for x in (error, size))
        allowed = bound * size.clamp(min=floor)
        assert bool((error <= allowed).all()), f"tensor {place}: error {error.tolist()} for sizes {size.tolist()}"
    assert len(actual) == len(expected)
