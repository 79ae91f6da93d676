"""One token in one kernel: equal to the ordinary way wherever it is taken, and not taken where it would differ."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from subquad import mixers
from subquad.kernels.steps import plan
from subquad.mixers.contract import map_state, named_leaves
from subquad.mixers.delta_net import DeltaNet

DIM = 48
CASES = [
    ("lightning", {}),
    ("lightning", {"gate": "linear", "norm": "simple_rms", "value_activation": "identity", "slopes": "none"}),
    ("lightning", {"gate": "none", "norm": "rms_per_head"}),
    ("lightning", {"norm": "rms", "layer_index": 1, "num_layers": 3}),
    ("lightning", {"norm": "none"}),
    ("retention", {}),
    ("retention", {"expand_k": 0.5, "expand_v": 1.0, "rope_base": 50.0}),
    ("gla", {}),
    ("gla", {"num_key_value_heads": 2, "conv_size": 4, "gate_temperature": 2.0}),
    ("gla", {"conv_size": 1, "expand_k": 1.0}),
    ("delta_net", {}),
    ("delta_net", {"conv_size": 0, "output_gate": True}),
    ("delta_net", {"num_value_heads": 8, "eigenvalues": (-1, 1), "conv_size": 2}),
    ("gated_delta_net", {}),
    ("gated_delta_net", {"num_value_heads": 8, "output_gate": False}),
    ("mamba", {}),
    ("mamba", {"state_size": 3, "conv_size": 2, "conv_bias": False, "step_rank": 5}),
]
PLAIN = ("lightning", "retention", "gla", "delta_net", "gated_delta_net")
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
names = pytest.mark.parametrize("name", PLAIN)


def make(name, dim=DIM, **options):
    torch.manual_seed(sum(map(ord, name)))
    mixer = mixers.build(name, dim, num_heads=4, **options).eval()
    with torch.no_grad():  # weights that start at one or zero would hide a mistake
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def tokens(batch, time, seed=0, dim=DIM):
    return torch.randn(batch, time, dim, generator=torch.Generator().manual_seed(seed))


def started(mixer, batch=2):
    """The state after a few tokens."""
    with torch.no_grad():
        return mixer(tokens(batch, 7, seed=3, dim=mixer.dim), use_state=True).state


@pytest.fixture
def taken(monkeypatch):
    """The kernels run, by name, as they are."""
    ran = []

    def run(family, *arguments):
        results = original(family, *arguments)
        if results is not None:
            ran.append(family)
        return results

    original = plan.run
    monkeypatch.setattr(plan, "run", run)
    return ran


@pytest.fixture
def ordinary(monkeypatch):
    """Calls a mixer with no kernel of any kind."""

    def call(mixer, *arguments, **options):
        with monkeypatch.context() as context, torch.no_grad():
            context.setenv("SUBQUAD_BACKEND", "chunked")
            return mixer(*arguments, **options)

    return call


def step(mixer, x, state, **options):
    with torch.no_grad():
        return mixer(x, state=state, use_state=True, **options)


def assert_same(result, expected):
    """Within 1e-5 of each tensor's largest entry: a few hundred float32 roundings, as in sums of some hundred terms."""
    pairs = [(result.output, expected.output)]
    pairs += [(a, b) for (_, a), (_, b) in zip(named_leaves(result.state), named_leaves(expected.state), strict=True)]
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if b.numel():
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@cases
@pytest.mark.parametrize("batch", [1, 4])
def test_steps_equal_the_ordinary_way(name, options, batch, taken, ordinary):
    mixer = make(name, **options)
    state = expected_state = started(mixer, batch)
    for t in range(4):
        x = tokens(batch, 1, seed=20 + t)
        result = step(mixer, x, state)
        expected = ordinary(mixer, x, state=expected_state, use_state=True)
        assert_same(result, expected)
        state, expected_state = result.state, expected.state
    assert len(taken) == 4


@names
def test_the_first_token_from_an_empty_state(name, taken, ordinary):
    mixer = make(name)
    empty = mixer.init_state(3, torch.float32, "cpu")
    assert_same(step(mixer, tokens(3, 1), empty), ordinary(mixer, tokens(3, 1), state=empty, use_state=True))
    assert taken


@names
def test_a_row_is_what_it_is_alone(name, taken):
    mixer, x = make(name), tokens(4, 1)
    state = started(mixer, 4)
    together = step(mixer, x, state)
    for row in range(4):
        alone = step(mixer, x[row : row + 1], map_state(lambda leaf, row=row: leaf[row : row + 1], state))
        torch.testing.assert_close(alone.output[0], together.output[row])
    assert len(taken) == 5


@names
def test_a_step_changes_no_argument_and_returns_fresh_tensors(name):
    mixer, x = make(name), tokens(2, 1)
    state = started(mixer)
    before = map_state(torch.clone, state)
    first, second = step(mixer, x, state), step(mixer, x, state)
    for (_, a), (_, b) in zip(named_leaves(state), named_leaves(before), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.output, second.output)
    addresses = [
        t.data_ptr() for r in (first, second) for t in (r.output, *(leaf for _, leaf in named_leaves(r.state)))
    ]
    assert len(set(addresses)) == len(addresses)


def test_a_token_cut_out_of_a_sequence_is_read_right(taken, ordinary):
    mixer, x = make("gla"), tokens(3, 5)
    state = started(mixer, 3)
    assert_same(step(mixer, x[:, 2:3], state), ordinary(mixer, x[:, 2:3], state=state, use_state=True))
    assert taken


@pytest.mark.parametrize("name", ["retention", "lightning"])
def test_given_positions(name, taken, ordinary):
    mixer, x = make(name), tokens(2, 1)
    state, positions = started(mixer), torch.tensor([[3], [100_000]])
    expected = ordinary(mixer, x, state=state, use_state=True, positions=positions)
    assert_same(step(mixer, x, state, positions=positions), expected)
    assert taken


def _in_place(mixer):
    for parameter in mixer.parameters():
        parameter.mul_(1.5)


def _load(mixer):
    mixer.load_state_dict({k: v * 1.5 for k, v in mixer.state_dict().items()})


def _assign(mixer):
    mixer.load_state_dict({k: v * 1.5 for k, v in mixer.state_dict().items()}, assign=True)


def _data(mixer):
    for parameter in mixer.parameters():
        parameter.data = parameter.data * 1.5


def _transposed(mixer):
    mixer.q_proj.weight.data = mixer.q_proj.weight.data.t()  # the same memory and shape


def _there_and_back(mixer):
    mixer.double().float()


def _replaced(mixer):
    mixer.o_proj = torch.nn.Linear(mixer.o_proj.in_features, DIM, bias=False)


def _biased(mixer):
    mixer.o_proj = torch.nn.Linear(mixer.o_proj.in_features, DIM)


def _adapted(mixer):
    import peft

    settings = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, mixer)


def _parametrized(mixer):
    torch.nn.utils.parametrizations.weight_norm(mixer.v_proj)
    mixer.v_proj.parametrizations.weight.original0.mul_(2)


def _hooked(mixer):
    mixer.k_proj.register_forward_hook(lambda module, arguments, output: 2 * output)


def _patched(mixer):
    original = mixer.v_proj.forward
    mixer.v_proj.forward = lambda x: 3 * original(x)


def _other_eps(mixer):
    mixer.o_norm.eps = 0.5


CHANGES = [
    *(_in_place, _load, _assign, _data, _transposed, _there_and_back, _replaced, _biased, _adapted, _parametrized),
    *(_hooked, _patched, _other_eps),
]


@names
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changes_between_two_steps(name, change, ordinary):
    options = {"expand_k": 1.0} if name in ("gla", "gated_delta_net") else {}
    mixer, x = make(name, **options), tokens(2, 1)
    state = started(mixer)
    before = step(mixer, x, state)
    with torch.no_grad():
        change(mixer)
    after = step(mixer, x, state)
    assert_same(after, ordinary(mixer, x, state=state, use_state=True))
    if change is not _there_and_back:
        assert not torch.allclose(after.output, before.output, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [("gla", "gate_temperature", 1.0), ("retention", "rope_base", 10.0), ("delta_net", "largest_beta", 2.0)],
)
def test_an_option_that_changes_between_two_steps(name, attribute, value, taken, ordinary):
    mixer, x = make(name), tokens(2, 1)
    state = started(mixer)
    before = step(mixer, x, state)
    setattr(mixer, attribute, value)
    after = step(mixer, x, state)
    assert len(taken) == 2
    assert not torch.allclose(after.output, before.output, rtol=1e-3)
    assert_same(after, ordinary(mixer, x, state=state, use_state=True))


@pytest.mark.parametrize("change", [_hooked, _adapted, _parametrized, _biased, _patched])
def test_what_is_not_plain_goes_the_ordinary_way(change, taken):
    mixer = make("delta_net")
    with torch.no_grad():
        change(mixer)
    step(mixer, tokens(2, 1), started(mixer))
    assert taken == []


def test_a_removed_hook_gives_the_kernel_back(taken):
    mixer = make("delta_net")
    seen = []
    handle = mixer.q_proj.register_forward_pre_hook(lambda module, arguments: seen.append(1))
    state = started(mixer)
    step(mixer, tokens(2, 1), state)
    assert len(seen) == 2
    handle.remove()
    step(mixer, tokens(2, 1), state)
    assert taken == ["delta"]


class Doubling(DeltaNet):
    """A user's own variant."""

    def recur(self, x, lengths, request):
        output, state = super().recur(x, lengths, request)
        return 2 * output, state


def test_a_subclass_is_computed_by_its_own_code(taken):
    torch.manual_seed(0)
    mixer, plain = Doubling(DIM).eval(), DeltaNet(DIM).eval()
    plain.load_state_dict(mixer.state_dict())
    state = started(plain)
    torch.testing.assert_close(
        step(mixer, tokens(2, 1), state).output, 2 * step(plain, tokens(2, 1), state).output, rtol=1e-4, atol=1e-6
    )
    assert taken == ["delta"]


@names
def test_other_calls_go_the_ordinary_way(name, taken):
    mixer, x = make(name), tokens(2, 1)
    state = started(mixer)
    mixer(x, state=state, use_state=True).output.sum().backward()  # gradients are wanted
    with torch.no_grad():
        mixer(x, state=state)
        mixer(x, use_state=True)
        mixer(tokens(2, 2), state=state, use_state=True)
        mixer(x, state=state, use_state=True, mask=torch.ones(2, 1, dtype=torch.bool))
        mixer(tokens(1, 2), state=state, use_state=True, cu_seqlens=torch.tensor([0, 1, 2]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixer(x, state=state, use_state=True)
        mixer.bfloat16()
        mixer(x.bfloat16(), state=mixer.init_state(2, torch.bfloat16, "cpu"), use_state=True)
    assert taken == []


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_backend_asked_for_by_the_environment_is_used(backend, monkeypatch, taken):
    mixer = make("gla")
    state = started(mixer)
    monkeypatch.setenv("SUBQUAD_BACKEND", backend)
    step(mixer, tokens(2, 1), state)
    assert taken == []
    monkeypatch.setenv("SUBQUAD_BACKEND", "cpu")
    step(mixer, tokens(2, 1), state)
    assert taken == ["gla"]
    monkeypatch.setenv("SUBQUAD_BACKEND", "cpuu")
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        step(mixer, tokens(2, 1), state)


@names
def test_a_state_that_does_not_fit_is_refused_as_ever(name):
    mixer = make(name)
    state = started(mixer, 2)
    with pytest.raises(ValueError, match="2 rows; this call has 3"):
        step(mixer, tokens(3, 1), state)
    with pytest.raises(ValueError, match="initial_state must be"):
        step(mixer, tokens(2, 1), state._replace(state=state.state[..., :-1]))
    with pytest.raises(ValueError, match="x must be"):
        step(mixer, tokens(2, 1)[..., :-1], state)


@names
def test_a_state_laid_out_otherwise_gives_the_same(name):
    mixer, x = make(name), tokens(4, 1)
    state = started(mixer, 4)
    strided = map_state(lambda leaf: leaf.repeat_interleave(2, dim=0)[::2], state)
    torch.testing.assert_close(step(mixer, x, strided).output, step(mixer, x, state).output, rtol=1e-4, atol=1e-6)


@names
def test_copies_and_pickles_have_weights_of_their_own(name, taken):
    mixer, x = make(name), tokens(2, 1)
    state, size, keys = started(mixer), len(pickle.dumps(mixer)), list(mixer.state_dict())
    expected = step(mixer, x, state).output
    assert len(pickle.dumps(mixer)) == size
    assert list(mixer.state_dict()) == keys
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(step(other, x, state).output, expected)
        with torch.no_grad():
            other.o_proj.weight.zero_()
        assert float(step(other, x, state).output.abs().max()) == 0
        assert torch.equal(step(mixer, x, state).output, expected)
    assert len(taken) == 7


@names
def test_threads_share_a_mixer(name, taken):
    mixer = make(name)
    inputs, state = [tokens(1, 1, seed=n) for n in range(32)], started(mixer, 1)
    expected = [step(mixer, x, state).output for x in inputs]
    mixer._steps.clear()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: step(mixer, x, state).output, inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert len(taken) == 64


def test_moved_weights_leave_no_memory_behind():
    mixer = make("gla")
    step(mixer, tokens(2, 1), started(mixer))
    assert mixer._steps._last is not None
    mixer.to(torch.float64)
    assert mixer._steps._last is None


def test_inference_mode(taken, ordinary):
    mixer, x = make("gated_delta_net"), tokens(2, 1)
    state = started(mixer)
    with torch.inference_mode():
        result = mixer(x, state=state, use_state=True)
    assert result.output.is_inference()
    assert_same(result, ordinary(mixer, x, state=state, use_state=True))
    assert taken


def test_a_large_batch_is_left_to_matrix_products(taken):
    mixer = make("lightning")
    batch = plan.LARGEST_WORK // (4 * DIM * DIM) + 1
    step(mixer, tokens(batch, 1), mixer.init_state(batch, torch.float32, "cpu"))
    assert taken == []


def test_not_a_number_stays_in_its_row(taken):
    mixer, x = make("gated_delta_net"), tokens(3, 1)
    state = started(mixer, 3)
    clean = step(mixer, x, state).output
    x[1, 0, 5] = torch.nan
    spoiled = step(mixer, x, state).output
    assert bool(spoiled[1].isnan().all())
    assert torch.equal(spoiled[0], clean[0])
    assert torch.equal(spoiled[2], clean[2])
    assert len(taken) == 2
