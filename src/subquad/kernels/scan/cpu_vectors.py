"""The inner loops of the selective scan on a CPU, in vector instructions: one token, a few vectors of channels, all N.

Arrays of states are ``(N, channels)``: neighbouring channels lie side by side, and what differs between the N states of
a channel, B_t[n] and C_t[n], is a scalar spread over a vector. LLVM finds half of this by itself: it will not keep a
channel's step, input and output in registers over n. Importing this module imports numba.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from subquad.kernels.numba_math import _SHIFT, _VECTOR, FASTMATH, LANES, _load, _multiply_add, _pointer, _splat, _store

#: Vectors of channels that one call takes on: enough to hide the latency of the exponential.
VECTORS = 4
#: Channels that one call takes on; blocks of channels are padded to a multiple of it.
CHANNELS = VECTORS * LANES
#: Below this power, 2^x counts as 0 (it is below the smallest normal float32).
LEAST_POWER = -126.0

LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)


def _power_series() -> list[float]:
    """Coefficients of 2^x = 1 + x q(x) on [-1/2, 1/2], q through its Chebyshev points: right to 2e-7.

    The 1 is exact, for a decay near 1 is applied thousands of times: an error that does not shrink with 1 - decay would
    change how long a state lasts.
    """

    def q(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        exponent = np.log(2) * np.where(x == 0, 1e-9, x)
        return np.expm1(exponent) / exponent * np.log(2)

    on_unit = np.polynomial.chebyshev.chebinterpolate(lambda x: q(x / 2), 4)
    series = np.polynomial.chebyshev.cheb2poly(on_unit)
    return [1.0, *(float(c) * 2.0**power for power, c in enumerate(series))]


_EXP2 = _power_series()


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)


def _exp2(builder: Any, x: Any) -> Any:
    """2^x for x <= 0, 0 below ``LEAST_POWER``; NaN stays NaN."""
    shifted = builder.fadd(x, _constant(_SHIFT))  # rounds to a whole number, kept in the low mantissa bits
    rest = builder.fsub(x, builder.fsub(shifted, _constant(_SHIFT)))
    series = _constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        series = _multiply_add(builder, series, rest, _constant(coefficient))
    integers = ir.VectorType(ir.IntType(32), LANES)
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANES))
    power = builder.bitcast(builder.add(builder.bitcast(series, integers), exponent), _VECTOR)
    return builder.select(builder.fcmp_ordered("<", x, _constant(LEAST_POWER)), _constant(0.0), power)


class _Places:
    """Vectors of arrays by element offset."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> None:
        self._context, self._builder, self._kinds, self._args = context, builder, signature.args, args

    def pointer(self, array: int, offset: Any) -> Any:
        return _pointer(self._context, self._builder, self._kinds[array], self._args[array], offset)

    def load(self, array: int, offset: Any) -> Any:
        return _load(self._builder, self.pointer(array, offset), _VECTOR)

    def store(self, value: Any, array: int, offset: Any) -> None:
        _store(self._builder, value, self.pointer(array, offset))

    def spread(self, array: int, offset: Any) -> Any:
        return _splat(self._builder, self._builder.load(self.pointer(array, offset)))


def _vector_offsets(builder: Any, at: Any) -> list[Any]:
    return [builder.add(at, ir.Constant(at.type, LANES * j)) for j in range(VECTORS)]


def _forward_step(keep: bool) -> Callable[..., Any]:
    """The intrinsic that takes ``CHANNELS`` channels a token on, and for the backward pass keeps what it needs."""

    @intrinsic
    def step(typingctx, states, block, at, rate, state, b, b_at, c, c_at, delta, write, out, carried, decays, kept_at):
        size = types.intp
        signature = types.void(
            *(size, size, size, rate, state, b, size, c, size, delta, write, out, carried, decays, size)
        )

        def codegen(context, builder, signature, args):
            (
                states, block, at, rate, state, b, b_at, c, c_at, delta, write, out, carried, decays, kept_at,
            ) = range(15)  # fmt: skip
            arrays = _Places(context, builder, signature, args)
            offsets = _vector_offsets(builder, args[at])
            steps = [arrays.load(delta, offset) for offset in offsets]
            writes = [arrays.load(write, offset) for offset in offsets]
            outputs = [cgutils.alloca_once_value(builder, arrays.load(out, offset)) for offset in offsets]
            with cgutils.for_range(builder, args[states]) as loop:
                row = builder.mul(loop.index, args[block])
                b_n = arrays.spread(b, builder.add(args[b_at], loop.index))
                c_n = arrays.spread(c, builder.add(args[c_at], loop.index))
                for j, offset in enumerate(offsets):
                    place = builder.add(row, offset)
                    decay = _exp2(builder, builder.fmul(steps[j], arrays.load(rate, place)))
                    before = builder.fmul(decay, arrays.load(state, place))
                    after = _multiply_add(builder, writes[j], b_n, before)
                    arrays.store(after, state, place)
                    if keep:
                        kept = builder.add(args[kept_at], place)
                        arrays.store(before, carried, kept)
                        arrays.store(decay, decays, kept)
                    builder.store(_multiply_add(builder, c_n, after, builder.load(outputs[j])), outputs[j])
            for output, offset in zip(outputs, offsets):
                arrays.store(builder.load(output), out, offset)
            return context.get_dummy_value()

        return signature, codegen

    return step


_advance, _replay = _forward_step(False), _forward_step(True)


# No "reassoc" in what computes 2^x: it would cancel the rounding to a whole number.
@njit(fastmath={"contract"})
def advance(states, block, rate, state, b, b_at, c, c_at, delta, write, out):
    """One token of a block: ``h[n] = 2^(delta rate[n]) h[n] + write b[n]``, ``out += sum_n c[n] h[n]``.

    ``rate`` and ``state (states, block)``, ``delta, write, out (block,)``; b and c are read from ``b_at``, ``c_at`` on.
    """
    for at in range(0, block, CHANNELS):
        _advance(states, block, at, rate, state, b, b_at, c, c_at, delta, write, out, state, state, 0)


@njit(fastmath={"contract"})
def replay(states, block, rate, state, b, b_at, c, c_at, delta, write, out, carried, decays, kept_at):
    """:func:`advance` that also leaves ``2^(delta rate)`` in ``decays`` and its product with the state before, in
    ``carried``, both ``(states, block)`` from element ``kept_at`` on."""
    for at in range(0, block, CHANNELS):
        _replay(
            states, block, at, rate, state, b, b_at, c, c_at, delta, write, out, carried, decays, kept_at
        )  # fmt: skip


@intrinsic
def _retreat(
    typingctx, states, block, at, rate, carried, decays, kept_at, grad, grad_rate, b, b_at, c, c_at, delta, write, dy,
    through_b, through_decay, grad_b, grad_c,
):  # fmt: skip
    size = types.intp
    signature = types.void(
        *(size, size, size, rate, carried, decays, size, grad, grad_rate, b, size, c, size, delta, write, dy),
        *(through_b, through_decay, grad_b, grad_c),
    )

    def codegen(context, builder, signature, args):
        (
            states, block, at, rate, carried, decays, kept_at, grad, grad_rate, b, b_at, c, c_at, delta, write, dy,
            through_b, through_decay, grad_b, grad_c,
        ) = range(20)  # fmt: skip
        arrays = _Places(context, builder, signature, args)
        offsets = _vector_offsets(builder, args[at])
        steps, writes, reads = ([arrays.load(x, offset) for offset in offsets] for x in (delta, write, dy))
        nothing = _constant(0.0)
        written = [cgutils.alloca_once_value(builder, nothing) for _ in offsets]
        decayed = [cgutils.alloca_once_value(builder, nothing) for _ in offsets]
        with cgutils.for_range(builder, args[states]) as loop:
            row = builder.mul(loop.index, args[block])
            lanes = builder.mul(loop.index, ir.Constant(row.type, LANES))
            b_n = arrays.spread(b, builder.add(args[b_at], loop.index))
            c_n = arrays.spread(c, builder.add(args[c_at], loop.index))
            b_sum, c_sum = arrays.load(grad_b, lanes), arrays.load(grad_c, lanes)
            for j, offset in enumerate(offsets):
                place = builder.add(row, offset)
                kept = builder.add(args[kept_at], place)
                before = arrays.load(carried, kept)
                g = _multiply_add(builder, c_n, reads[j], arrays.load(grad, place))
                c_sum = _multiply_add(builder, reads[j], _multiply_add(builder, writes[j], b_n, before), c_sum)
                b_sum = _multiply_add(builder, g, writes[j], b_sum)
                builder.store(_multiply_add(builder, g, b_n, builder.load(written[j])), written[j])
                through = builder.fmul(g, before)
                rates = arrays.load(rate, place)
                builder.store(_multiply_add(builder, through, rates, builder.load(decayed[j])), decayed[j])
                arrays.store(_multiply_add(builder, through, steps[j], arrays.load(grad_rate, place)), grad_rate, place)
                arrays.store(builder.fmul(g, arrays.load(decays, kept)), grad, place)
            arrays.store(b_sum, grad_b, lanes)
            arrays.store(c_sum, grad_c, lanes)
        for total, results in ((through_b, written), (through_decay, decayed)):
            for result, offset in zip(results, offsets):
                arrays.store(builder.load(result), total, offset)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=FASTMATH)
def retreat(
    states, block, rate, carried, decays, kept_at, grad, grad_rate, b, b_at, c, c_at, delta, write, dy,
    through_b, through_decay, grad_b, grad_c,
):  # fmt: skip
    """One token of a block backwards, after :func:`replay`, with g the gradient of the state after it::

        g[n] += c[n] dy            through_b = sum_n g[n] b[n]      through_decay = sum_n g[n] carried[n] rate[n]
        grad_rate[n] += delta g[n] carried[n]     grad_b[n] += g[n] write     grad_c[n] += dy h[n]     g[n] *= decays[n]

    ``grad_b`` and ``grad_c (states, LANES)`` are sums over channels, up to the last addition across lanes.
    """
    for at in range(0, block, CHANNELS):
        _retreat(
            states, block, at, rate, carried, decays, kept_at, grad, grad_rate, b, b_at, c, c_at, delta, write, dy,
            through_b, through_decay, grad_b, grad_c,
        )  # fmt: skip
