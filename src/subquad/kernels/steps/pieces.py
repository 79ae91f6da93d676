"""Pieces of which one-token kernels are composed: projections, short convolution, activations, norms, rotation.

Rows are tokens of different sequences, or their heads: ``(rows, channels)`` float32, contiguous. Most pieces change
their first argument in place. Importing this module imports numba.
"""

import math

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from subquad.kernels.numba_math import FASTMATH, exp32

#: A division that checks for zero, numba's default, would keep its loop from vector instructions.
PIECE = {"fastmath": FASTMATH, "error_model": "numpy"}


def _pointer_to(kind):
    """An intrinsic that makes a pointer of an address."""

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), codegen

    return pointer


_floats, _integers = _pointer_to(types.float32), _pointer_to(types.int64)


@njit
def array_at(address, shape):
    """The float32 array of this shape at an address: a fifth of the time that a tensor takes to become an array."""
    return carray(_floats(address), shape)


@njit
def integers_at(address, rows):
    """The int64 array ``(rows,)`` at an address."""
    return carray(_integers(address), (rows,))


@njit
def count(seen, after, rows):
    """One token more in each row: ``after = seen + 1``, both addresses."""
    seen, after = integers_at(seen, rows), integers_at(after, rows)
    for b in range(rows):
        after[b] = seen[b] + 1


@njit(**PIECE)
def project(x, weight):
    """``x W^T``: a weight is read from memory once for all rows."""
    out = np.empty((x.shape[0], weight.shape[0]), np.float32)
    project_into(x, weight, out)
    return out


@njit(**PIECE)
def project_into(x, weight, out):
    """``out = x W^T``. Both halves of the weight are read side by side: two streams come from a far cache sooner."""
    half, width = weight.shape[0] // 2, weight.shape[1]
    for n in range(half):
        for b in range(x.shape[0]):
            upper, lower = np.float32(0), np.float32(0)
            for d in range(width):
                upper += weight[n, d] * x[b, d]
                lower += weight[half + n, d] * x[b, d]
            out[b, n], out[b, half + n] = upper, lower
    for n in range(2 * half, weight.shape[0]):
        for b in range(x.shape[0]):
            total = np.float32(0)
            for d in range(width):
                total += weight[n, d] * x[b, d]
            out[b, n] = total


@njit(**PIECE)
def convolve(x, weight, tail, after):
    """Causal convolution of x with the earlier tokens ``(rows, width - 1, channels)`` at the address ``tail``.

    At ``after`` it leaves those that the next token needs.
    """
    before = weight.shape[1] - 1
    tail, after = array_at(tail, (x.shape[0], before, x.shape[1])), array_at(after, (x.shape[0], before, x.shape[1]))
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            newest = x[b, c]
            total = newest * weight[c, before]
            for t in range(before):
                total += tail[b, t, c] * weight[c, t]
            x[b, c] = total
            for t in range(1, before):
                after[b, t - 1, c] = tail[b, t, c]
            if before > 0:
                after[b, before - 1, c] = newest


@njit(**PIECE)
def sigmoid32(x):
    # not min(): it would lose NaN; beyond 88 exp32 leaves float32
    negated = np.float32(88) if -x > np.float32(88) else -x
    return np.float32(1) / (np.float32(1) + exp32(negated))


@njit(**PIECE)
def sigmoid(x):
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[b, c] = sigmoid32(x[b, c])


@njit(**PIECE)
def silu(x):
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[b, c] *= sigmoid32(x[b, c])


@njit(**PIECE)
def log_sigmoid32(x):
    low = x if x < 0 else np.float32(0)
    return low - np.float32(math.log1p(exp32(-abs(x))))


@njit(**PIECE)
def softplus32(x):
    return x - log_sigmoid32(x)


@njit(**PIECE)
def multiply(x, factor):
    """``x *= factor``."""
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[b, c] *= factor[b, c]


@njit(**PIECE)
def sum_of_squares(x, b):
    total = np.float32(0)
    for c in range(x.shape[1]):
        total += x[b, c] * x[b, c]
    return total


@njit(**PIECE)
def l2_normalize(x, eps):
    """``x / sqrt(sum x^2 + eps)`` of each row."""
    for b in range(x.shape[0]):
        factor = np.float32(1) / math.sqrt(sum_of_squares(x, b) + np.float32(eps))
        for c in range(x.shape[1]):
            x[b, c] *= factor


@njit(**PIECE)
def rms_norm(x, weight, eps):
    """``x / sqrt(mean x^2 + eps) * weight`` of every piece of a row that is as long as the weight: a row or a head."""
    rows = x.reshape((-1, weight.shape[0]))
    for b in range(rows.shape[0]):
        factor = np.float32(1) / math.sqrt(sum_of_squares(rows, b) / np.float32(rows.shape[1]) + np.float32(eps))
        for c in range(rows.shape[1]):
            rows[b, c] *= factor * weight[c]


@njit(**PIECE)
def simple_rms_norm(x, eps):
    """``x / (sqrt(mean x^2) + eps)`` of each row."""
    for b in range(x.shape[0]):
        factor = np.float32(1) / (math.sqrt(sum_of_squares(x, b) / np.float32(x.shape[1])) + np.float32(eps))
        for c in range(x.shape[1]):
            x[b, c] *= factor


@njit(**PIECE)
def layer_norm(x, weight, bias, eps):
    """Each row less its mean, over its standard deviation, times weight plus bias."""
    for b in range(x.shape[0]):
        mean = np.float32(0)
        for c in range(x.shape[1]):
            mean += x[b, c]
        mean /= np.float32(x.shape[1])
        for c in range(x.shape[1]):
            x[b, c] -= mean
        factor = np.float32(1) / math.sqrt(sum_of_squares(x, b) / np.float32(x.shape[1]) + np.float32(eps))
        for c in range(x.shape[1]):
            x[b, c] = x[b, c] * factor * weight[c] + bias[c]


@njit(**PIECE)
def rotate(x, positions, rates):
    """Turns the channels (c, c + K/2) of each head of ``x (B, H, K)`` by ``position * rate``."""
    half = rates.shape[0]
    for b in range(x.shape[0]):
        for c in range(half):
            angle = np.float32(positions[b]) * rates[c]
            cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            for h in range(x.shape[1]):
                first, second = x[b, h, c], x[b, h, half + c]
                x[b, h, c] = first * cos - second * sin
                x[b, h, half + c] = second * cos + first * sin


@njit
def spread_heads(x, heads, width):
    """``x (B, groups * width)`` as ``(B, heads, width)``: neighbouring heads share a group."""
    groups = x.shape[1] // width
    out = np.empty((x.shape[0], heads, width), np.float32)
    for b in range(x.shape[0]):
        for h in range(heads):
            at = h * groups // heads * width
            for c in range(width):
                out[b, h, c] = x[b, at + c]
    return out
