"""Numerical building blocks of the numba kernels: small matrix products, transposes, an exponential, triangular solves.

Everything is float32. The products are not BLAS calls: at the sizes of one chunk (32 x 64 x 64) a BLAS spends as much
time on packing as on multiplying, and its speed hangs on which library was loaded and how it detected the machine.
Here LLVM gets one register tile written in vector instructions and compiles it for the machine at hand. Importing this
module imports numba, so only modules that hold numba kernels import it.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

#: What kernels may assume: sums can be reordered and fused, zeros are unsigned; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

#: Floats in one vector of the matrix products.
LANES = 16 if "+avx512f" in get_host_cpu_features() else 8
#: Rows of one register tile: with two vectors a row, eight sums hide the latency of a fused multiply-add.
TILE_ROWS = 4
#: Rows and columns of scratch tiles are rounded up to this, a whole number of vectors and of transpose blocks.
PADDING = 16
#: Rows and columns moved at once by ``transpose``.
TRANSPOSE_BLOCK = 8


@njit
def whole(size):
    """``size`` rounded up to a multiple of ``PADDING``: columns to multiply and rows to transpose of a scratch tile."""
    return (size + PADDING - 1) // PADDING * PADDING


@njit
def padded(size):
    """Length of the rows, and number of rows, of a scratch tile of ``size``.

    Strides that are multiples of 512 bytes would put the rows of a tile in few cache sets: they get more padding.
    """
    return whole(size) + (PADDING if whole(size) % 128 == 0 else 0)


# --- matrix products ------------------------------------------------------------------------------------------------

_WORD, _FLOAT = ir.IntType(types.intp.bitwidth), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INDEX = ir.IntType(32)


def _word(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _pointer(context, builder, kind, array, offset):
    """Address of element ``offset`` of an array's data."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(builder.bitcast(data, _FLOAT.as_pointer()), [offset])


def _load(builder, pointer, kind):
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = 4
    return value


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _splat(builder, scalar):
    empty = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES))


def _multiply_add(builder, x, y, z):
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def _sum_products(builder, rows, vectors, k, a, a_row, a_step, b, b_step):
    """``rows x vectors`` registers with the sums over k of a's entries, spread, times b's vectors."""
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    before, loop, after = builder.block, builder.append_basic_block("products"), builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed(">", k, _word(0)), loop, after)

    builder.position_at_end(loop)
    step, a_here, b_here = builder.phi(_WORD), builder.phi(a.type), builder.phi(b.type)
    sums = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(rows)]
    right = [_load(builder, builder.gep(b_here, [_word(LANES * j)]), _VECTOR) for j in range(vectors)]
    results = []
    for i in range(rows):
        left = _splat(builder, builder.load(builder.gep(a_here, [builder.mul(a_row, _word(i))])))
        results.append([_multiply_add(builder, left, right[j], sums[i][j]) for j in range(vectors)])
    following = builder.add(step, _word(1))
    for value, start, end in (
        (step, _word(0), following),
        (a_here, a, builder.gep(a_here, [a_step])),
        (b_here, b, builder.gep(b_here, [b_step])),
        *((value, zero, end) for row, ends in zip(sums, results) for value, end in zip(row, ends)),
    ):
        value.add_incoming(start, before)
        value.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, k), loop, after)

    builder.position_at_end(after)
    totals = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(rows)]
    for row, ends in zip(totals, results):
        for value, end in zip(row, ends):
            value.add_incoming(zero, before)
            value.add_incoming(end, loop)
    return totals


def _vector_place(builder, start, row_step, i, j):
    return builder.gep(start, [builder.add(builder.mul(row_step, _word(i)), _word(LANES * j))])


def _register_tile(rows: int, vectors: int):
    """An intrinsic for ``rows`` x ``vectors * LANES`` entries of a product."""

    @intrinsic
    def tile(typingctx, k, alpha, a, a_at, a_row, a_step, b, b_at, b_step, accumulate, c, c_at, c_row):
        size = types.intp
        signature = types.void(size, types.float32, a, size, size, size, b, size, size, types.boolean, c, size, size)

        def codegen(context, builder, signature, args):
            k, alpha, a, a_at, a_row, a_step, b, b_at, b_step, accumulate, c, c_at, c_row = args
            a = _pointer(context, builder, signature.args[2], a, a_at)
            b = _pointer(context, builder, signature.args[6], b, b_at)
            c = _pointer(context, builder, signature.args[10], c, c_at)
            sums = _sum_products(builder, rows, vectors, k, a, a_row, a_step, b, b_step)
            factor = _splat(builder, alpha)
            with builder.if_else(builder.icmp_unsigned("!=", accumulate, accumulate.type(0))) as (add, replace):
                for branch, adds in ((add, True), (replace, False)):
                    with branch:
                        for i in range(rows):
                            for j in range(vectors):
                                place = _vector_place(builder, c, c_row, i, j)
                                old = _load(builder, place, _VECTOR) if adds else ir.Constant(_VECTOR, [0.0] * LANES)
                                _store(builder, _multiply_add(builder, sums[i][j], factor, old), place)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_tile_4x2, _tile_4x1 = _register_tile(TILE_ROWS, 2), _register_tile(TILE_ROWS, 1)
_tile_1x2, _tile_1x1 = _register_tile(1, 2), _register_tile(1, 1)


@njit(fastmath=FASTMATH)
def multiply(transposed, m, n, k, alpha, a, b, accumulate, c):
    """The leading m x n part of c becomes ``alpha a b``, or grows by it if ``accumulate``.

    a is m x k, or k x m if ``transposed``; b is k x n.
    Two-dimensional arrays, rows contiguous. Columns beyond whole vectors are done one by one: where b and c
    have rows of ``padded`` length, pass ``whole(n)`` and leave the excess unread.
    """
    lda, b_step, c_row = a.strides[0] // 4, b.strides[0] // 4, c.strides[0] // 4
    a_row, a_step = (1, lda) if transposed else (lda, 1)
    column = 0
    while column + LANES <= n:
        wide = column + 2 * LANES <= n
        row = 0
        while row < m:
            a_at, c_at = row * a_row, row * c_row + column
            if row + TILE_ROWS <= m:
                if wide:
                    _tile_4x2(k, alpha, a, a_at, a_row, a_step, b, column, b_step, accumulate, c, c_at, c_row)
                else:
                    _tile_4x1(k, alpha, a, a_at, a_row, a_step, b, column, b_step, accumulate, c, c_at, c_row)
                row += TILE_ROWS
            else:
                if wide:
                    _tile_1x2(k, alpha, a, a_at, a_row, a_step, b, column, b_step, accumulate, c, c_at, c_row)
                else:
                    _tile_1x1(k, alpha, a, a_at, a_row, a_step, b, column, b_step, accumulate, c, c_at, c_row)
                row += 1
        column += 2 * LANES if wide else LANES
    for i in range(m):
        for j in range(column, n):
            total = np.float32(0)
            for p in range(k):
                total += (a[p, i] if transposed else a[i, p]) * b[p, j]
            c[i, j] = alpha * total + (c[i, j] if accumulate else np.float32(0))


@intrinsic
def _transpose_block(typingctx, source, source_at, source_row, target, target_at, target_row):
    """An 8 x 8 block: eight loads, three rounds of interleaving pairs of rows, eight stores."""
    size = types.intp

    def codegen(context, builder, signature, args):
        source, source_at, source_row, target, target_at, target_row = args
        n = TRANSPOSE_BLOCK
        vector = ir.VectorType(_FLOAT, n)
        source = _pointer(context, builder, signature.args[0], source, source_at)
        target = _pointer(context, builder, signature.args[3], target, target_at)
        rows = [_load(builder, builder.gep(source, [builder.mul(source_row, _word(i))]), vector) for i in range(n)]
        for distance in (4, 2, 1):  # swap the off-diagonal quarters of every block of twice this size
            low = [i if i % (2 * distance) < distance else n + i - distance for i in range(n)]
            high = [i + distance if i % (2 * distance) < distance else n + i for i in range(n)]
            low, high = (ir.Constant(ir.VectorType(_INDEX, n), lanes) for lanes in (low, high))
            for i in range(n):
                if i % (2 * distance) < distance:
                    upper, lower = rows[i], rows[i + distance]
                    rows[i] = builder.shuffle_vector(upper, lower, low)
                    rows[i + distance] = builder.shuffle_vector(upper, lower, high)
        for i in range(n):
            _store(builder, rows[i], builder.gep(target, [builder.mul(target_row, _word(i))]))
        return context.get_dummy_value()

    return types.void(source, size, size, target, size, size), codegen


@njit(fastmath=FASTMATH)
def transpose(source, rows, columns, target):
    """Write the transpose of the leading ``rows x columns`` of ``source``; whole 8 x 8 blocks are fast."""
    source_row, target_row = source.strides[0] // 4, target.strides[0] // 4
    whole_rows, whole_columns = rows // TRANSPOSE_BLOCK * TRANSPOSE_BLOCK, columns // TRANSPOSE_BLOCK * TRANSPOSE_BLOCK
    for i in range(0, whole_rows, TRANSPOSE_BLOCK):
        for j in range(0, whole_columns, TRANSPOSE_BLOCK):
            _transpose_block(source, i * source_row + j, source_row, target, j * target_row + i, target_row)
    for i in range(rows):
        for j in range(whole_columns if i < whole_rows else 0, columns):
            target[j, i] = source[i, j]


# --- exponential ----------------------------------------------------------------------------------------------------


@intrinsic
def _scale_by_power(typingctx, value, shifted):
    """``value * 2^n`` where ``shifted = 1.5 * 2^23 + n`` holds the integer n in its low mantissa bits."""
    signature = types.float32(types.float32, types.float32)

    def codegen(context, builder, signature, args):
        integer = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[1], integer), ir.Constant(integer, 23))
        return builder.bitcast(builder.add(builder.bitcast(args[0], integer), exponent), _FLOAT)

    return signature, codegen


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few bits: its product with a whole number below 2^15 is exact
_LN2_LOW = np.float32(0.6931471805599453 - 0.693359375)
_SHIFT = np.float32(1.5 * 2**23)  # adding it rounds to a whole number, kept in the low mantissa bits
_C3, _C4, _C5, _C6, _C7 = (np.float32(1 / n) for n in (6, 24, 120, 720, 5040))


# No "reassoc" here: it would cancel the rounding by _SHIFT.
@njit(fastmath={"contract"})
def exp32(x):
    """e^x for -87 <= x <= 88 with a relative error below 2e-7; 0 below -87; NaN stays NaN. Vectorises."""
    shifted = x * _LOG2_E + _SHIFT
    whole = shifted - _SHIFT
    rest = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = (((_C7 * rest + _C6) * rest + _C5) * rest + _C4) * rest + _C3
    series = (series * rest + np.float32(0.5)) * (rest * rest) + rest + np.float32(1)
    result = _scale_by_power(series, shifted)
    return np.float32(0) if x < np.float32(-87) else result


# --- unit lower-triangular systems ----------------------------------------------------------------------------------
# Substitution, never an inverse by doubling: with repeated keys the powers of the triangle reach binomials of 1e18.


def _substitution_tile(rows: int, upward: bool):
    """An intrinsic that solves ``rows`` rows, ``PADDING`` columns: less the solved rows' share, then in registers.

    ``a`` holds the factors of the k solved rows at ``b``; ``triangle`` the block on the diagonal, read below it.
    """

    @intrinsic
    def tile(typingctx, k, a, a_at, a_row, a_step, b, b_at, b_step, triangle, triangle_at, triangle_row, c, c_at):
        size = types.intp
        signature = types.void(size, a, size, size, size, b, size, size, triangle, size, size, c, size)

        def codegen(context, builder, signature, args):
            k, a, a_at, a_row, a_step, b, b_at, b_step, triangle, triangle_at, triangle_row, c, c_at = args
            a = _pointer(context, builder, signature.args[1], a, a_at)
            b = _pointer(context, builder, signature.args[5], b, b_at)
            triangle = _pointer(context, builder, signature.args[8], triangle, triangle_at)
            c = _pointer(context, builder, signature.args[11], c, c_at)
            minus = ir.Constant(_VECTOR, [-1.0] * LANES)
            vectors = range(PADDING // LANES)
            sums = _sum_products(builder, rows, len(vectors), k, a, a_row, a_step, b, b_step)
            places = [[_vector_place(builder, c, b_step, i, j) for j in vectors] for i in range(rows)]
            values = [
                [_multiply_add(builder, sums[i][j], minus, _load(builder, places[i][j], _VECTOR)) for j in vectors]
                for i in range(rows)
            ]
            for i in reversed(range(rows)) if upward else range(rows):
                for solved in range(i + 1, rows) if upward else range(i):
                    entry = builder.add(builder.mul(triangle_row, _word(max(i, solved))), _word(min(i, solved)))
                    factor = _splat(builder, builder.fneg(builder.load(builder.gep(triangle, [entry]))))
                    values[i] = [_multiply_add(builder, factor, values[solved][j], values[i][j]) for j in vectors]
                for j in vectors:
                    _store(builder, values[i][j], places[i][j])
            return context.get_dummy_value()

        return signature, codegen

    return tile


_down_4, _down_1 = _substitution_tile(TILE_ROWS, False), _substitution_tile(1, False)
_up_4, _up_1 = _substitution_tile(TILE_ROWS, True), _substitution_tile(1, True)


@njit(fastmath=FASTMATH)
def solve_unit_lower(triangle, values, rows, columns):
    """Overwrite ``values (rows, columns)`` with ``(I + triangle)^-1 values``; only entries below the diagonal are read.

    ``columns`` is a multiple of ``PADDING``, as ``whole`` gives it.
    """
    row, step = triangle.strides[0] // 4, values.strides[0] // 4
    for column in range(0, columns, PADDING):
        i = 0
        while i < rows:
            at, place = i * row, i * step + column
            if i + TILE_ROWS <= rows:
                _down_4(i, triangle, at, row, 1, values, column, step, triangle, at + i, row, values, place)
                i += TILE_ROWS
            else:
                _down_1(i, triangle, at, row, 1, values, column, step, triangle, at + i, row, values, place)
                i += 1


@njit(fastmath=FASTMATH)
def solve_unit_lower_transposed(triangle, values, rows, columns):
    """Overwrite ``values (rows, columns)`` with ``(I + triangle)^-T values``; as ``solve_unit_lower`` otherwise."""
    row, step = triangle.strides[0] // 4, values.strides[0] // 4
    for column in range(0, columns, PADDING):
        below = rows
        while below > 0:
            i = below - (TILE_ROWS if below >= TILE_ROWS else 1)
            at, place, solved = below * row + i, i * step + column, below * step + column
            if below >= TILE_ROWS:
                _up_4(
                    rows - below, triangle, at, 1, row, values, solved, step, triangle, i * row + i, row, values, place
                )
            else:
                _up_1(
                    rows - below, triangle, at, 1, row, values, solved, step, triangle, i * row + i, row, values, place
                )
            below = i
