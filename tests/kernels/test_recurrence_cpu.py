"""The CPU kernels of the shared recurrence against its definition: a float64 loop over tokens, and autograd."""

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from subquad.kernels.recurrence import cpu

SMALLEST_NORMAL = 2.0**-126  # below it float32 has no relative accuracy
BOUND = {torch.float32: 1e-4, torch.bfloat16: 4 * 2.0**-8, torch.float16: 4 * 2.0**-8}
DECAYS = ["none", "constant", "scalar", "vector"]


def token_loop(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale):
    """The definition; ``initial_state`` (N, H, K, V), any floating dtype."""
    batch, time, _, _ = q.shape
    updates = k.shape[1] // time
    bounds = [0, time] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(begin, end):
            if log_decay is not None:
                gate = log_decay.expand(batch, -1) if log_decay.dim() == 1 else log_decay[:, t]
                gate = gate[..., None] if gate.dim() == 2 else gate
                state = gate.clamp(min=-100).exp()[..., None] * state
            for s in range(t * updates, (t + 1) * updates):
                if beta is None:
                    write, residual = k[:, s], v[:, s]
                else:
                    write = beta[:, s, :, None] * k[:, s]
                    residual = v[:, s] - torch.einsum("bhkv,bhk->bhv", state, k[:, s])
                state = state + write[..., None] * residual[..., None, :]
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        states.append(state)
    return torch.stack(outputs, 1), torch.cat(states)


class Problem:
    """Random arguments of ``forward``: float64 leaves that hold exactly what the kernel is given."""

    scale = 0.3

    def __init__(
        self, decay, erase, time, *, strength=1.0, batch=1, heads=2, key=16, value=16, updates=1, cu_seqlens=None,
        dtype=torch.float32, change=lambda problem: None, seed=0,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.q = self.normal(batch, time, heads, key)
        self.k = self.normal(batch, time * updates, heads, key)
        self.k = self.k / self.k.norm(dim=-1, keepdim=True) if erase else self.k * key**-0.5
        self.v = self.normal(batch, time * updates, heads, value)
        self.beta = 2 * torch.rand(batch, time * updates, heads, generator=self.generator) if erase else None
        self.initial_state = self.normal(sequences, heads, key, value)
        shapes = {"constant": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key)}
        self.log_decay = None
        if decay != "none":
            self.log_decay = -strength * torch.rand(shapes[decay], generator=self.generator)
        change(self)
        for name in ("q", "k", "v"):
            setattr(self, name, getattr(self, name).to(dtype).double().requires_grad_())
        for name in ("log_decay", "beta", "initial_state"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).float().double().requires_grad_())

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    @property
    def leaves(self):
        every = (self.q, self.k, self.v, self.log_decay, self.beta, self.initial_state)
        return [x for x in every if x is not None]

    def arguments(self):
        """As the kernel takes them, up to ``cu_seqlens``."""
        values = [x.detach().to(self.dtype) for x in (self.q, self.k, self.v)]
        values += [None if x is None else x.detach().float() for x in (self.log_decay, self.beta, self.initial_state)]
        return [*values, self.cu_seqlens]

    def run(self, chunk_size=64):
        """Output, final state, gradients of a random linear loss: by the kernels, the definition, and their sizes."""
        batch, time, heads, _ = self.q.shape
        gate = self.log_decay
        if gate is not None and gate.dim() == 1:
            gate = gate.expand(batch, time, heads)
        inputs = [self.q, self.k, self.v, gate, self.beta, self.initial_state]
        o, final = token_loop(*inputs, self.cu_seqlens, self.scale)
        grad_o = self.normal(*o.shape).to(self.dtype)
        grad_final = self.normal(*final.shape)
        loss = (o * grad_o.double()).sum() + (final * grad_final.double()).sum()
        definition = [o.detach(), final.detach(), *torch.autograd.grad(loss, [x for x in inputs if x is not None])]
        sizes = [x.abs() for x in definition]
        if gate is not self.log_decay:
            # The gradient of a constant decay is the sum of its tokens' gradients, of either sign: what it can be
            # accurate to is a share of the sum of their sizes, not of a total that may happen to vanish.
            sizes[5] = sizes[5].sum((0, 1))
            definition[5] = definition[5].sum((0, 1))
        arguments = self.arguments()
        o, final, *saved = cpu.forward(*arguments, self.scale, chunk_size, True)
        grads = cpu.backward(grad_o, grad_final, *arguments, *saved, self.scale, chunk_size)
        return [o, final, *(x for x in grads if x is not None)], definition, sizes

    def leaves_or_none(self):
        return self.q, self.k, self.v, self.log_decay, self.beta, self.initial_state


def assert_close(actual, definition, sizes, bound):
    """Per tensor and head: max |a - b| <= bound max size. The head is axis 1 of states, 0 of constant decays."""
    for index, (a, b, size) in enumerate(zip(actual, definition, sizes, strict=True)):
        assert a.shape == b.shape
        head = 0 if b.dim() == 1 else 1 if index in (1, len(definition) - 1) else 2
        error, size = (x.movedim(head, 0).flatten(1 if b.dim() > 1 else 0) for x in ((a.double() - b).abs(), size))
        if b.dim() > 1:
            error, size = error.amax(1), size.amax(1)
        assert (error <= bound * size + SMALLEST_NORMAL).all(), (index, error / size)


def check(*args, chunk_size=64, **kwargs):
    problem = Problem(*args, **kwargs)
    assert_close(*problem.run(chunk_size), BOUND[problem.dtype])


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
class TestEveryKindEqualsTheDefinition:
    @pytest.mark.parametrize("time", [1, 15, 63, 64, 65, 200])
    def test_at_this_length(self, decay, erase, time):
        check(decay, erase, time, batch=2, key=7, value=12)

    @pytest.mark.parametrize("strength", [0.0, 0.01, 3.0, 40.0])
    def test_at_this_strength_of_decay(self, decay, erase, strength):
        check(decay, erase, 150, strength=strength, heads=3)

    def test_when_every_decay_is_e_to_minus_60(self, decay, erase):
        def strong(problem):
            if decay != "none":
                problem.log_decay = torch.full_like(problem.log_decay, -60.0)

        check(decay, erase, 70, change=strong)

    def test_when_one_channel_resets_at_every_token(self, decay, erase):
        def reset(problem):
            if decay != "none":
                problem.log_decay[..., 0] = -100.0

        check(decay, erase, 70, change=reset)

    def test_packed_with_empty_and_odd_sequences(self, decay, erase):
        check(decay, erase, 330, heads=1, cu_seqlens=[0, 0, 7, 7, 300, 330])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision(self, decay, erase, dtype):
        check(decay, erase, 100, dtype=dtype)

    def test_at_widths_above_one_vector(self, decay, erase):
        check(decay, erase, 40, heads=1, key=130, value=35)


@settings(deadline=None, max_examples=25)
@given(
    decay=st.sampled_from(DECAYS),
    erase=st.booleans(),
    time=st.integers(1, 80),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    key=st.integers(1, 20),
    value=st.integers(1, 20),
    updates=st.integers(1, 4),
    chunk_size=st.sampled_from([1, 5, 16, 64]),
    strength=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_any_shape_equals_the_definition(erase, updates, chunk_size, **kwargs):
    check(erase=erase, updates=updates if erase else 1, chunk_size=chunk_size, **kwargs)


@pytest.mark.parametrize(("decay", "erase"), [("scalar", False), ("vector", True)])
def test_long_sequences_equal_the_definition(decay, erase):
    check(decay, erase, 4097, heads=1, key=8, value=8, strength=0.05)


@pytest.mark.parametrize("decay", DECAYS)
def test_identical_keys_and_reflections(decay):
    """beta = 2 reflects, so an error e in |k|^2 (some 2^-24) grows by 1 + 2 e at every token: 64 tokens keep 1e-4."""

    def reflect(problem):
        problem.k = problem.k[:, :1].expand_as(problem.k).contiguous()
        problem.beta = torch.full_like(problem.beta, 2.0)

    check(decay, True, 64, change=reflect)


@pytest.mark.parametrize("strength", [39.9, 40.1])
def test_decays_on_either_side_of_the_chunks_range(strength):
    def sharp(problem):
        problem.log_decay = torch.full_like(problem.log_decay, -strength / 31)

    check("vector", False, 64, change=sharp)
    check("scalar", True, 64, change=sharp)


def test_sequences_packed_run_bit_for_bit_like_alone():
    problem = Problem("vector", True, 90, cu_seqlens=[0, 33, 33, 90])
    q, k, v, log_decay, beta, state, _ = problem.arguments()
    packed, final, *_ = cpu.forward(*problem.arguments(), 1.0, 64, False)
    for n, (begin, end) in enumerate([(0, 33), (33, 33), (33, 90)]):
        if begin == end:
            assert torch.equal(final[n], state[n])
            continue
        alone = [x[:, begin:end] for x in (q, k, v, log_decay, beta)]
        o, last, *_ = cpu.forward(*alone, state[n : n + 1], None, 1.0, 64, False)
        assert torch.equal(packed[:, begin:end], o)
        assert torch.equal(final[n : n + 1], last)


@pytest.mark.parametrize("split", [1, 31, 32, 77])
def test_two_pieces_equal_one_run(split):
    q, k, v, log_decay, beta, state, _ = Problem("vector", True, 100).arguments()
    whole, final, *_ = cpu.forward(q, k, v, log_decay, beta, state, None, 1.0, 64, False)
    for piece in (slice(None, split), slice(split, None)):
        o, state, *_ = cpu.forward(*(x[:, piece] for x in (q, k, v, log_decay, beta)), state, None, 1.0, 64, False)
        torch.testing.assert_close(o, whole[:, piece], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_a_hard_reset_forgets_everything_before_it():
    q, k, v, log_decay, beta, state, _ = Problem("scalar", True, 60).arguments()
    log_decay[:, 25] = -float("inf")
    o, final, *_ = cpu.forward(q, k, v, log_decay, beta, state, None, 1.0, 64, False)
    rest = [x[:, 25:] for x in (q, k, v, log_decay, beta)]
    fresh, last, *_ = cpu.forward(*rest, None, None, 1.0, 64, False)
    torch.testing.assert_close(o[:, 25:], fresh)
    torch.testing.assert_close(final, last)


def test_a_write_with_beta_one_and_a_unit_key_is_read_back():
    _, k, v, _, beta, state, _ = Problem("none", True, 50).arguments()
    o, *_ = cpu.forward(k, k, v, None, torch.ones_like(beta), state, None, 1.0, 64, False)
    torch.testing.assert_close(o, v, rtol=1e-4, atol=1e-4)


def test_second_updates_without_strength_change_nothing():
    q, k, v, log_decay, beta, state, _ = Problem("scalar", True, 40, updates=2).arguments()
    beta[:, 1::2] = 0
    two, final, *_ = cpu.forward(q, k, v, log_decay, beta, state, None, 1.0, 64, False)
    one, last, *_ = cpu.forward(q, k[:, ::2], v[:, ::2], log_decay, beta[:, ::2], state, None, 1.0, 64, False)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)


def test_slow_decay_does_not_drift_over_100_000_tokens():
    """The same key and value at every token make the state a geometric series."""
    time, rate = 100_000, -1e-4
    ones = torch.ones(1, time, 1, 1)
    _, state, *_ = cpu.forward(ones, ones, ones, torch.full((1, time, 1), rate), None, None, None, 1.0, 64, False)
    exponent = torch.tensor(rate).double()
    expected = torch.expm1(time * exponent) / torch.expm1(exponent)
    assert abs(state.item() / expected.item() - 1) < 1e-4


def test_nan_stays_in_its_head_of_its_sequence():
    problem = Problem("vector", True, 70, batch=2, heads=2)
    q, k, v, log_decay, beta, state, _ = problem.arguments()
    clean, clean_state, *_ = cpu.forward(q, k, v, log_decay, beta, state, None, 1.0, 64, False)
    log_decay[0, 40, 1, 3] = float("nan")
    o, final, *saved = cpu.forward(q, k, v, log_decay, beta, state, None, 1.0, 64, True)
    ones, state_ones = torch.ones_like(o), torch.zeros_like(final)
    grads = cpu.backward(ones, state_ones, q, k, v, log_decay, beta, state, None, *saved, 1.0, 64)
    kept = [(0, 0), (1, 0), (1, 1)]
    assert o[0, 40:, 1].isnan().all()
    assert final[0, 1, 3].isnan().all()
    for b, h in kept:
        assert torch.equal(o[b, :, h], clean[b, :, h])
        assert torch.equal(final[b, h], clean_state[b, h])
        assert all(g[b, :, h].isfinite().all() for g in grads[:-1])


def test_saved_tensors_have_the_shapes_announced_and_are_not_needed_for_the_result():
    for kwargs in ({"erase": True}, {"erase": False}, {"erase": True, "updates": 3}):
        for place in ({"batch": 2}, {"cu_seqlens": [0, 100, 400, 600]}):
            problem = Problem("scalar", time=600, heads=1, key=5, value=6, **kwargs, **place)
            arguments = problem.arguments()
            o, final, *saved = cpu.forward(*arguments, 1.0, 64, True)
            bare_o, bare_final, *nothing = cpu.forward(*arguments, 1.0, 64, False)
            sequences = len(final)
            shapes = cpu.saved_shapes(problem.q.shape, problem.k.shape, 6, 3, kwargs["erase"], sequences, 64)
            assert tuple(tuple(x.shape) for x in saved) == shapes
            assert [x.numel() for x in nothing] == [0, 0]
            assert torch.equal(o, bare_o)
            assert torch.equal(final, bare_final)


@pytest.mark.parametrize("erase", [False, True])
def test_one_head_is_shared_between_threads_by_value_columns(erase):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check("vector", erase, 130, heads=1, value=100)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_definition(decay, erase, dtype):
    time, updates = 5, 3 if erase else 1
    problem = Problem(decay, erase, time, batch=2, key=9, value=20, updates=updates, dtype=dtype)
    definition, last = token_loop(*problem.leaves_or_none(), None, problem.scale)
    q, k, v, log_decay, beta, state, _ = problem.arguments()
    for t in range(time):
        at = slice(t * updates, (t + 1) * updates)
        gate = log_decay if log_decay is None or decay == "constant" else log_decay[:, t]
        before = state.clone()
        o, following = cpu.step(
            q[:, t], k[:, at], v[:, at], gate, None if beta is None else beta[:, at], state, problem.scale
        )
        assert o.dtype == dtype
        assert torch.equal(before, state)
        assert (o.double() - definition[:, t]).abs().max() <= BOUND[dtype] * definition[:, t].abs().max()
        state = following
    assert (state.double() - last).abs().max() <= 1e-5 * last.abs().max()


class _InWorker(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        torch.set_num_threads(2)
        return cpu.forward(*Problem("scalar", True, 40, heads=4).arguments(), 1.0, 64, False)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers fork on POSIX systems only")
def test_a_forked_data_loader_worker_gets_the_same_result():
    before = torch.get_num_threads()
    try:
        here = _InWorker()[0]
    finally:
        torch.set_num_threads(before)
    (there,) = DataLoader(_InWorker(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert torch.equal(here, there)


def _changed(**changes):
    names = ["q", "k", "v", "log_decay", "beta", "initial_state", "cu_seqlens"]
    arguments = dict(zip(names, Problem("scalar", True, 20).arguments(), strict=True))
    return [*{**arguments, **{name: change(arguments[name]) for name, change in changes.items()}}.values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": lambda x: x[0]}, r"q is of shape \(20, 2, 16\), but \(batch, time, heads, key width\)"),
        ({"q": lambda x: x[:, :0]}, "without an empty dimension"),
        ({"k": lambda x: x[:, :19]}, r"k is of shape \(1, 19, 2, 16\)"),
        ({"k": lambda x: x[..., :5]}, "k is of shape"),
        ({"v": lambda x: x[:, :, :1]}, "v is of shape"),
        ({"log_decay": lambda x: x[:, :3]}, r"one of \(2,\), \(1, 20, 2\), \(1, 20, 2, 16\) is needed"),
        ({"log_decay": lambda x: -x}, "log_decay must be at most 0"),
        ({"beta": lambda x: x[..., :1]}, "beta is of shape"),
        ({"beta": lambda x: x + 1.5}, r"beta must lie in \[0, 2\]"),
        ({"beta": lambda x: -x}, r"beta must lie in \[0, 2\]"),
        ({"initial_state": lambda x: x[..., :3]}, r"initial_state is of shape \(1, 2, 16, 3\)"),
        ({"cu_seqlens": lambda x: torch.tensor([0, 12, 10, 20])}, "must rise from 0 to the number of tokens 20"),
        ({"cu_seqlens": lambda x: torch.tensor([0, 21])}, "must rise from 0"),
        ({"cu_seqlens": lambda x: torch.tensor([-1, 20])}, "must rise from 0"),
        ({"cu_seqlens": lambda x: torch.tensor([0.0, 20.0])}, "whole numbers"),
        ({"cu_seqlens": lambda x: torch.tensor([0, 5, 20])}, r"initial_state .* \(2, 2, 16, 16\) is needed"),
    ],
)
def test_bad_input_gets_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        cpu.forward(*_changed(**changes), 1.0, 64, False)


def test_other_bad_input_gets_a_sentence():
    q, k, v, log_decay, beta, state, _ = arguments = Problem("scalar", True, 300).arguments()
    with pytest.raises(ValueError, match="chunk_size is 0"):
        cpu.forward(*arguments, 1.0, 0, False)
    two = [torch.cat([x, x]) for x in (q, k, v)]
    with pytest.raises(ValueError, match="packed sequences"):
        cpu.forward(*two, None, None, None, torch.tensor([0, 300]), 1.0, 64, False)
    with pytest.raises(ValueError, match="3 updates per token need it"):
        cpu.forward(q[:, :100], k, v, None, None, None, None, 1.0, 64, False)
    o, final, _, _ = cpu.forward(*arguments, 1.0, 64, False)
    with pytest.raises(ValueError, match="pass what forward"):
        cpu.backward(o, final, *arguments, torch.empty(0), torch.empty(0), 1.0, 64)
    token = [q[:, 0], k[:, :1], v[:, :1], log_decay[:, 0], beta[:, :1], state]
    for index, change, message in [
        (0, lambda x: x[:, :1], "k, v is of shapes"),
        (1, lambda x: x[0], "q, k, v is of shapes"),
        (3, lambda x: x[:, :1], "log_decay is of shape"),
        (3, lambda x: 1 - x, "log_decay must be at most 0"),
        (4, lambda x: x + 2, r"beta must lie in \[0, 2\]"),
        (4, lambda x: x[0], "beta is of shape"),
        (5, lambda x: x[..., 1:], "state is of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.step(*(change(x) if i == index else x for i, x in enumerate(token)), 1.0)
