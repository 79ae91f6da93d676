"""The Triton kernels of the shared recurrence against its definition, a float64 loop over tokens under autograd.

Without a GPU they run in Triton's interpreter (see ``conftest.py``), at sizes that suit it.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from subquad.kernels.recurrence import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-4, torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-8}
DECAYS = ["none", "constant", "scalar", "vector"]
only_on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="minutes in the interpreter, and it rounds nothing to tf32")
NAMES = ["o", "final_state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial_state"]


@dataclass(frozen=True)
class Arguments:
    """Float64 arguments of the recurrence whose values are exact in the dtypes that the kernels take."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor
    grad_o: Tensor
    grad_final_state: Tensor
    cu_seqlens: Tensor | None = None
    dtype: torch.dtype = torch.float32
    scale: float = 0.3

    def cast(self) -> "Arguments":
        narrow = ("q", "k", "v", "grad_o")
        moved = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                dtype = self.dtype if name in narrow else torch.int64 if name == "cu_seqlens" else torch.float32
                moved[name] = x.to(DEVICE, dtype).contiguous()
        return replace(self, **moved)


def arguments(
    decay: str, erase: bool, time: int, *, batch=1, heads=2, key=16, value=16, updates=1, strength=1.0, cu_seqlens=None,
    dtype=torch.float32, seed=0,
) -> Arguments:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    k = normal(batch, time * updates, heads, key)
    k = k / (k.norm(dim=-1, keepdim=True) if erase else key**0.5)
    shapes = {"constant": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key)}
    log_decay = beta = None
    if decay != "none":
        log_decay = -strength * torch.rand(shapes[decay], generator=generator).double()
    if erase:
        beta = 2 * torch.rand(batch, time * updates, heads, generator=generator).double()
    return Arguments(
        q=normal(batch, time, heads, key, dtype=dtype),
        k=k.to(dtype).double(),
        v=normal(batch, time * updates, heads, value, dtype=dtype),
        log_decay=None if log_decay is None else log_decay.float().double(),
        beta=beta,
        initial_state=normal(sequences, heads, key, value),
        grad_o=normal(batch, time, heads, value, dtype=dtype),
        grad_final_state=normal(sequences, heads, key, value),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
        dtype=dtype,
    )


def token_loop(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale):
    """The definition."""
    batch, time = q.shape[:2]
    updates = k.shape[1] // time
    bounds = [0, time] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(begin, end):
            if log_decay is not None:
                gate = log_decay.expand(batch, -1) if log_decay.ndim == 1 else log_decay[:, t]
                gate = gate[..., None] if gate.ndim == 2 else gate
                state = gate.clamp(min=-100).exp()[..., None] * state
            for s in range(t * updates, (t + 1) * updates):
                written = v[:, s]
                if beta is not None:
                    written = beta[:, s, :, None] * (written - torch.einsum("bhkv,bhk->bhv", state, k[:, s]))
                state = state + k[:, s, :, :, None] * written[..., None, :]
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        states.append(state)
    return torch.stack(outputs, 1), torch.cat(states)


def by_definition(a: Arguments) -> list[Tensor | None]:
    inputs = [a.q, a.k, a.v, a.log_decay, a.beta, a.initial_state]
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    results = token_loop(*leaves, a.cu_seqlens, a.scale)
    torch.autograd.backward(results, (a.grad_o, a.grad_final_state))
    return [*results, *(None if x is None else x.grad for x in leaves)]


def by_kernels(a: Arguments, chunk_size: int) -> list[Tensor | None]:
    a = a.cast()
    inputs = (a.q, a.k, a.v, a.log_decay, a.beta, a.initial_state, a.cu_seqlens)
    o, final_state, saved, updates = gpu.forward(*inputs, a.scale, chunk_size, save=True)
    gradients = gpu.backward(a.grad_o, a.grad_final_state, *inputs, saved, updates, a.scale, chunk_size)
    return [o, final_state, *gradients]


def assert_per_head(actual: list[Tensor | None], expected: list[Tensor | None], bound: float) -> None:
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is None or y is None:
            continue
        assert x.shape == y.shape, name
        head = 0 if x.ndim == 1 else 1 if "state" in name else 2
        x, y = (z.detach().cpu().double().movedim(head, 0).reshape(z.shape[head], -1) for z in (x, y))
        error, size = (x - y).abs().amax(1), y.abs().amax(1)
        assert (error <= bound * size).all(), f"{name}: {(error / size).tolist()} > {bound} of the largest entry"


def check(a: Arguments, chunk_size: int = 64) -> None:
    assert_per_head(by_kernels(a, chunk_size), by_definition(a), BOUND[a.dtype])


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_kind_equals_the_definition(decay, erase):
    check(arguments(decay, erase, 18, batch=2, key=10, value=18), chunk_size=16)


@pytest.mark.parametrize("time", [1, 15, 63, 65, 130])
def test_any_length(time):
    check(arguments("vector", True, time, heads=1, key=5, value=3, seed=time))


@only_on_gpu
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", BOUND)
def test_thousands_of_tokens_at_the_usual_width(dtype, decay, erase):
    check(arguments(decay, erase, 4097, heads=1, key=128, value=128, dtype=dtype))


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("strength", [0.0, 3.0, 40.0])
def test_any_strength_of_decay(strength, decay, erase):
    check(arguments(decay, erase, 34, heads=1, strength=strength), chunk_size=32)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_decay_that_leaves_almost_nothing(decay, erase):
    a = arguments(decay, erase, 34, heads=1)
    check(replace(a, log_decay=torch.full_like(a.log_decay, -60)), chunk_size=32)


@pytest.mark.parametrize("reset", [-100.0, -1e6])
def test_one_channel_is_reset_at_every_token(reset):
    a = arguments("vector", True, 34, heads=1)
    a.log_decay[..., 3] = reset
    check(a, chunk_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["none", "vector"])
def test_one_key_again_and_again_with_full_reflection(decay, dtype):
    """beta = 2 reflects: an error e in |k|^2, at most 2^-24 a term, grows by 1 + 2 e per token; 64 tokens keep 1e-4."""
    a = arguments(decay, True, 64, heads=1, strength=0.0, dtype=dtype)
    check(replace(a, k=a.k[:, :1].expand_as(a.k).contiguous(), beta=torch.full_like(a.beta, 2)))


@pytest.mark.parametrize(("key", "value", "decay", "erase"), [
    (1, 1, "vector", True), (130, 8, "vector", True), (256, 8, "scalar", True), (18, 70, "constant", False),
])  # fmt: skip
def test_widths(key, value, decay, erase):
    check(arguments(decay, erase, 20, heads=1, key=key, value=value), chunk_size=32)


@pytest.mark.parametrize(("updates", "decay"), [(2, "vector"), (3, "scalar"), (2, "constant")])
def test_several_updates_per_token(updates, decay):
    check(arguments(decay, True, 11, heads=1, updates=updates, value=7), chunk_size=16)


@pytest.mark.parametrize(("decay", "erase", "updates"), [
    ("constant", False, 1), ("scalar", True, 3), ("vector", True, 1),
])  # fmt: skip
def test_packed_sequences_equal_separate_ones(decay, erase, updates):
    boundaries = [0, 0, 17, 17, 33, 34, 34]
    a = arguments(decay, erase, 34, heads=1, updates=updates, cu_seqlens=boundaries)
    packed = by_kernels(a, 16)
    assert_per_head(packed, by_definition(a), BOUND[a.dtype])
    assert torch.equal(packed[1][0].cpu(), a.initial_state[0].float())  # an empty sequence keeps its state
    alone = replace(a.cast(), cu_seqlens=None)
    begin, end = boundaries[3], boundaries[4]
    rows = slice(begin * updates, end * updates)
    gate = alone.log_decay
    o, state, _, _ = gpu.forward(
        *(x.contiguous() for x in (alone.q[:, begin:end], alone.k[:, rows], alone.v[:, rows])),
        gate if gate is None or gate.ndim == 1 else gate[:, begin:end].contiguous(),
        None if alone.beta is None else alone.beta[:, rows].contiguous(),
        alone.initial_state[3:4].contiguous(), None, a.scale, 16, save=False,
    )  # fmt: skip
    assert torch.equal(packed[0][:, begin:end], o)
    assert torch.equal(packed[1][3:4], state)


@pytest.mark.parametrize(("decay", "erase"), [("none", False), ("scalar", True), ("vector", False), ("vector", True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats(dtype, decay, erase):
    check(arguments(decay, erase, 40, heads=1, dtype=dtype), chunk_size=64)


def test_float16_state_beyond_the_range_of_float16():
    a = arguments("none", False, 40, heads=1, dtype=torch.float16)
    large = replace(a, q=a.q / 16, initial_state=a.initial_state * 2.0**17, grad_o=a.grad_o / 2**9)
    assert large.initial_state.abs().max() > torch.finfo(torch.float16).max
    check(large, chunk_size=16)


@settings(deadline=None, max_examples=4, derandomize=True)
@given(
    kind=st.tuples(st.sampled_from(DECAYS), st.booleans()),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(any),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    updates=st.integers(1, 2),
    chunk_size=st.integers(1, 100),
)
def test_drawn_shapes(kind, lengths, widths, updates, chunk_size):
    boundaries = torch.tensor([0, *lengths]).cumsum(0).tolist()
    key, value = widths
    a = arguments(*kind, sum(lengths), heads=1, key=key, value=value, updates=updates, cu_seqlens=boundaries)
    check(a, chunk_size)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_step_equals_the_definition(decay, erase):
    a = arguments(decay, erase, 1, batch=2, key=18, value=35, updates=2 if erase else 1)
    x = a.cast()
    before = x.initial_state.clone()
    gate = x.log_decay if decay in ("none", "constant") else x.log_decay[:, 0]
    o, state = gpu.step(x.q[:, 0], x.k, x.v, gate, x.beta, x.initial_state, x.scale)
    expected = token_loop(a.q, a.k, a.v, a.log_decay, a.beta, a.initial_state, None, a.scale)
    torch.testing.assert_close(o[:, None].double().cpu(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double().cpu(), expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(x.initial_state, before)


def test_two_pieces_equal_one_run():
    a = arguments("vector", True, 40, heads=1).cast()
    whole = gpu.forward(a.q, a.k, a.v, a.log_decay, a.beta, a.initial_state, None, a.scale, 16, save=False)
    state, outputs = a.initial_state, []
    for piece in (slice(0, 21), slice(21, 40)):
        part = [x[:, piece].contiguous() for x in (a.q, a.k, a.v, a.log_decay, a.beta)]
        o, state, _, _ = gpu.forward(*part, state, None, a.scale, 16, save=False)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole[1], rtol=1e-4, atol=1e-5)


def test_no_initial_state_is_zeros():
    a = arguments("scalar", True, 20, heads=1).cast()
    inputs = (a.q, a.k, a.v, a.log_decay, a.beta)
    without = gpu.forward(*inputs, None, None, a.scale, 16, save=True)
    zeros = gpu.forward(*inputs, torch.zeros_like(a.initial_state), None, a.scale, 16, save=True)
    assert all(torch.equal(x, y) for x, y in zip(without, zeros, strict=True))
    grads = gpu.backward(a.grad_o, a.grad_final_state, *inputs, None, None, *without[2:], a.scale, 16)
    assert grads[-1].shape == a.initial_state.shape


@pytest.mark.parametrize("place", ["k", "log_decay"])
def test_nan_stays_in_its_batch_row_and_head(place):
    a = arguments("scalar", True, 9, batch=2, key=4, value=4).cast()
    clean = by_kernels(a, 16)
    getattr(a, place)[(1, 1) if place == "initial_state" else (1, 5, 1)] = float("nan")
    spoilt = by_kernels(a, 16)
    assert spoilt[0][1, :, 1].isnan().any()
    for name, x, y in zip(NAMES, clean, spoilt, strict=True):
        head = 1 if "state" in name else 2
        for batch, which in ((0, 0), (0, 1), (1, 0)):
            assert torch.equal(x[batch].select(head - 1, which), y[batch].select(head - 1, which)), name


@pytest.mark.parametrize(("batch", "cu_seqlens", "decay", "erase"), [
    (1, None, "none", True), (3, None, "constant", False), (1, [0, 5, 5, 32], "vector", True),
])  # fmt: skip
def test_saved_tensors_have_the_shapes_foretold(batch, cu_seqlens, decay, erase):
    a = arguments(decay, erase, 32, batch=batch, heads=1, cu_seqlens=cu_seqlens).cast()
    inputs = (a.q, a.k, a.v, a.log_decay, a.beta, a.initial_state, a.cu_seqlens, a.scale, 16)
    _, final_state, *saved = gpu.forward(*inputs, save=True)
    ndim = None if a.log_decay is None else a.log_decay.ndim
    shapes = gpu.saved_shapes(a.q.shape, a.k.shape, a.v.shape[-1], ndim, erase, final_state.shape[0], 16)
    assert tuple(tuple(x.shape) for x in saved) == shapes
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in saved)
    assert [x.numel() for x in gpu.forward(*inputs, save=False)[2:]] == [0, 0]


def test_keys_wider_than_a_tile_are_refused():
    a = arguments("none", False, 2, heads=1, key=257).cast()
    with pytest.raises(ValueError, match=r'at most 256; q and k have 257. Use backend="chunked"'):
        gpu.forward(a.q, a.k, a.v, None, None, None, None, 1.0, 64, save=False)
    with pytest.raises(ValueError, match="at most 256"):
        gpu.step(a.q[:, 0], a.k[:, :1], a.v[:, :1], None, None, a.initial_state, 1.0)
