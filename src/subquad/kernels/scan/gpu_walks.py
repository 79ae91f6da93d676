"""The selective scan's Triton kernels: a walk over the tokens of a sequence, and the walk back chunk by chunk."""

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + e^x); the logarithm as 2 atanh(y / (2 + y)), exact for small y too."""
    small = tl.exp(-tl.abs(x))
    s = small / (2.0 + small)
    q = s * s
    series = 2.0 / 9 + q * (2.0 / 11 + q * (2.0 / 13 + q * (2.0 / 15)))
    series = 2.0 + q * (2.0 / 3 + q * (2.0 / 5 + q * (2.0 / 7 + q * series)))
    return tl.maximum(x, 0.0) + s * series


@triton.jit
def _place(groups, blocks, group_channels, states, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a program: its sequence, block and group, its channels and states, and which of them there are."""
    program = tl.program_id(0)
    block = program % blocks
    group = program // blocks % groups
    sequence = program // (blocks * groups)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    return sequence.to(tl.int64), block, group, group * group_channels + d, n, d < group_channels, n < states


@triton.jit
def _steps(delta, delta_bias, at, d, real):
    step = tl.load(delta + at + d, real, 0.0).to(tl.float32)
    if delta_bias is not None:
        step = tl.where(real, _softplus(step + tl.load(delta_bias + d, real, 0.0)), 0.0)
    return step


@triton.jit
def forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    gate,
    initial_state,
    starts,
    kept_starts,
    y,
    last,
    saved,
    channels,
    states,
    groups,
    blocks,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, _, group, d, n, real_d, real_n = _place(groups, blocks, channels // groups, states, BLOCK_D, BLOCK_N)
    tile, real = d[:, None] * states + n, real_d[:, None] & real_n
    size = channels.to(tl.int64) * states
    rate = tl.load(A + tile, real, 0.0)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if initial_state is not None:
        state += tl.load(initial_state + sequence * size + tile, real, 0.0)
    begin, end, kept = tl.load(starts + sequence), tl.load(starts + sequence + 1), tl.load(kept_starts + sequence)
    for t in range(begin, end):
        if saved is not None:  # noqa: SIM102 (decided when the kernel is compiled)
            if (t > begin) & ((t - begin) % CHUNK == 0):
                tl.store(saved + (kept + (t - begin) // CHUNK - 1) * size + tile, state, real)
        at = t * channels
        step = _steps(delta, delta_bias, at, d, real_d)
        inputs = tl.load(u + at + d, real_d, 0.0).to(tl.float32)
        shared = (t * groups + group) * states + n
        b = tl.load(B + shared, real_n, 0.0).to(tl.float32)
        c = tl.load(C + shared, real_n, 0.0).to(tl.float32)
        state = tl.exp(step[:, None] * rate) * state + (step * inputs)[:, None] * b
        out = tl.sum(state * c, 1)
        if D is not None:
            out += tl.load(D + d, real_d, 0.0) * inputs
        if gate is not None:
            z = tl.load(gate + at + d, real_d, 0.0).to(tl.float32)
            out *= z * tl.sigmoid(z)
        tl.store(y + at + d, out, real_d)
    tl.store(last + sequence * size + tile, state, real)


@triton.jit
def backward_kernel(
    grad_y,
    grad_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    gate,
    initial_state,
    starts,
    kept_starts,
    saved,
    scratch,
    grad_u,
    grad_delta,
    grad_gate,
    grad_a,
    grad_channels,
    grad_shared,
    grad_initial,
    sequences,
    tokens,
    channels,
    states,
    groups,
    blocks,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, block, group, d, n, real_d, real_n = _place(groups, blocks, channels // groups, states, BLOCK_D, BLOCK_N)
    tile, real = d[:, None] * states + n, real_d[:, None] & real_n
    size = channels.to(tl.int64) * states
    own = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n
    scratch += tl.program_id(0).to(tl.int64) * CHUNK * BLOCK_D * BLOCK_N
    rate = tl.load(A + tile, real, 0.0)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if D is not None:
        skip += tl.load(D + d, real_d, 0.0)
    grad = tl.load(grad_state + sequence * size + tile, real, 0.0)
    of_rate = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    of_skip = tl.zeros((BLOCK_D,), tl.float32)
    of_bias = tl.zeros((BLOCK_D,), tl.float32)
    begin, end, kept = tl.load(starts + sequence), tl.load(starts + sequence + 1), tl.load(kept_starts + sequence)
    chunks = (end - begin + CHUNK - 1) // CHUNK
    for k in range(chunks):
        chunk = chunks - 1 - k
        first = begin + chunk * CHUNK
        length = tl.minimum(end - first, CHUNK)
        state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        if chunk > 0:
            state = tl.load(saved + (kept + chunk - 1) * size + tile, real, 0.0)
        elif initial_state is not None:
            state = tl.load(initial_state + sequence * size + tile, real, 0.0)
        for i in range(length):  # the state before each token of the chunk
            tl.store(scratch + i * BLOCK_D * BLOCK_N + own, state)
            at = (first + i) * channels
            step = _steps(delta, delta_bias, at, d, real_d)
            inputs = tl.load(u + at + d, real_d, 0.0).to(tl.float32)
            b = tl.load(B + ((first + i) * groups + group) * states + n, real_n, 0.0).to(tl.float32)
            state = tl.exp(step[:, None] * rate) * state + (step * inputs)[:, None] * b
        tl.debug_barrier()
        for j in range(length):
            i = length - 1 - j
            t = first + i
            at = t * channels
            step = _steps(delta, delta_bias, at, d, real_d)
            inputs = tl.load(u + at + d, real_d, 0.0).to(tl.float32)
            shared = (t * groups + group) * states + n
            b = tl.load(B + shared, real_n, 0.0).to(tl.float32)
            c = tl.load(C + shared, real_n, 0.0).to(tl.float32)
            dy = tl.load(grad_y + at + d, real_d, 0.0).to(tl.float32)
            decay = tl.exp(step[:, None] * rate)
            carried = decay * tl.load(scratch + i * BLOCK_D * BLOCK_N + own)
            after = carried + (step * inputs)[:, None] * b
            if gate is not None:
                z = tl.load(gate + at + d, real_d, 0.0).to(tl.float32)
                s = tl.sigmoid(z)
                out = tl.sum(after * c, 1) + skip * inputs
                tl.store(grad_gate + at + d, dy * out * s * (1.0 + z * (1.0 - s)), real_d)
                dy *= z * s
            grad += dy[:, None] * c
            through_b = tl.sum(grad * b, 1)
            through = grad * carried
            of_step = inputs * through_b + tl.sum(through * rate, 1)
            if delta_bias is not None:
                logit = tl.load(delta + at + d, real_d, 0.0).to(tl.float32) + tl.load(delta_bias + d, real_d, 0.0)
                of_step *= tl.sigmoid(logit)
                of_bias += of_step
            tl.store(grad_u + at + d, skip * dy + step * through_b, real_d)
            tl.store(grad_delta + at + d, of_step, real_d)
            partial = grad_shared + ((block.to(tl.int64) * tokens + t) * groups + group) * states + n
            tl.store(partial, tl.sum(grad * (step * inputs)[:, None], 0), real_n)
            second = blocks.to(tl.int64) * tokens * groups * states
            tl.store(partial + second, tl.sum(after * dy[:, None], 0), real_n)
            of_rate += through * step[:, None]
            of_skip += dy * inputs
            grad *= decay
    tl.store(grad_initial + sequence * size + tile, grad, real)
    tl.store(grad_a + sequence * size + tile, of_rate, real)
    tl.store(grad_channels + sequence * channels + d, of_skip, real_d)
    tl.store(grad_channels + (sequences + sequence) * channels + d, of_bias, real_d)
