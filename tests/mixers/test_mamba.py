"""What is particular to Mamba: its block by hand and beside transformers', its start, its padding, its fast path."""

import math

import pytest
import torch
import torch.nn.functional as F

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.mixers.mamba import LEAST_STEP, STEP_RANGE
from subquad.training.optimizers import parameter_groups
from tests.mixers.cases import DIM, make, tokens


def test_it_is_the_block_of_the_paper():
    mixer, x = make("mamba", state_size=5), tokens()
    rank = DIM // 16
    inner, gate = mixer.in_proj(x).chunk(2, -1)
    padded = F.pad(inner.mT, (3, 0))
    u = F.silu(F.conv1d(padded, mixer.conv1d.weight[:, None], mixer.conv1d.bias, groups=2 * DIM)).mT
    low, B, C = mixer.x_proj(u).split([rank, 5, 5], -1)
    delta = F.softplus(low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    state, outputs = torch.zeros(2, 2 * DIM, 5, dtype=torch.float64), []
    for t in range(x.shape[1]):
        decay = torch.exp(-delta[:, t, :, None] * mixer.A_log.exp())
        state = decay * state + (delta * u)[:, t, :, None] * B[:, t, None]
        y = (state * C[:, t, None]).sum(-1) + mixer.D * u[:, t]
        outputs.append(mixer.out_proj(y * F.silu(gate[:, t])))
    result = mixer(x, use_state=True)
    torch.testing.assert_close(result.output, torch.stack(outputs, 1))
    torch.testing.assert_close(result.state.state, state)
    torch.testing.assert_close(result.state.tail, inner[:, -3:])


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "step_rank": 7, "state_size": 3}])
def test_it_equals_transformers_mixer(options):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer, x = make("mamba", torch.float32, **options), tokens(dtype=torch.float32)
    config = MambaConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        use_bias=options.get("bias", False),
        use_conv_bias=options.get("conv_bias", True),
        time_step_rank=options.get("step_rank", "auto"),
        state_size=options.get("state_size", 16),
    )
    theirs = MambaMixer(config, 0).eval()
    weights = mixer.state_dict()
    theirs.load_state_dict({**weights, "conv1d.weight": weights["conv1d.weight"][:, None]})
    torch.testing.assert_close(mixer(x).output, theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time", [1, 40])
def test_the_kernels_equal_float64(time):
    exact, fast = make("mamba"), make("mamba", torch.float32)
    x = tokens(time=time)
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, : time // 3] = False
    expected = exact(x, mask=mask, use_state=True)
    actual = fast(x.float(), mask=mask, use_state=True)
    torch.testing.assert_close(actual.output.double(), expected.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.state.state.double(), expected.state.state, rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_does_not_let_the_state_decay():
    mixer, x = make("mamba"), tokens()
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[:, 9:] = False
    padded = mixer(x, mask=mask, use_state=True).state
    alone = mixer(x[:, :9], use_state=True).state
    torch.testing.assert_close(padded.state, alone.state, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(padded.tail, alone.tail, rtol=1e-12, atol=1e-15)


def test_it_starts_as_the_paper_says_also_inside_a_model():
    config = SubquadConfig(
        mixers="mamba", hidden_size=256, num_hidden_layers=4, num_attention_heads=1, feedforward=None, vocab_size=50
    )
    model = SubquadForCausalLM(config)
    for mixer in model.model.mixers():
        step = F.softplus(mixer.dt_proj.bias)
        assert bool(((step > STEP_RANGE[0] * 0.99) & (step < STEP_RANGE[1] * 1.01)).all())
        assert step.min() < 2e-3
        assert step.max() > 5e-2
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
        assert bool((mixer.D == 1).all())
        assert mixer.dt_proj.weight.abs().max().item() == pytest.approx(16**-0.5, rel=0.01)
        # torch's own start of a map from n inputs is uniform within n^-1/2; the last one over the root of the layers
        assert mixer.in_proj.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)
        assert mixer.out_proj.weight.abs().max().item() == pytest.approx(512**-0.5 / 2, rel=0.01)
        assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert STEP_RANGE[0] > LEAST_STEP


def test_rates_and_skips_are_not_decayed_by_the_optimizer():
    groups = parameter_groups(make("mamba"), 0.1)
    decayed = {name for name, _ in groups[0]["params"]}
    assert decayed == {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight", "conv1d.weight"}


def test_rates_stay_float32_under_autocast():
    mixer, x = make("mamba", torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mixer(x, use_state=True)
    exact = mixer(x).output
    assert rounded.state.state.dtype == torch.float32
    assert (rounded.output - exact).abs().max() <= 8 * 2**-8 * exact.abs().max()


def _other_rates(mixer):
    mixer.A_log.mul_(0.5)


def _hooked(mixer):
    mixer.dt_proj.register_forward_hook(lambda module, arguments, output: output + 1)


def _biased(mixer):
    mixer.out_proj = torch.nn.Linear(2 * DIM, DIM)


def _other_bias(mixer):
    mixer.conv1d.bias = torch.nn.Parameter(torch.ones(2 * DIM))


@pytest.mark.parametrize("change", [_other_rates, _hooked, _biased, _other_bias])
@torch.no_grad()
def test_a_layer_that_changes_between_two_steps(change):
    """Whole tokens go through one kernel, which must see every change or leave the layer alone."""
    mixer, x = make("mamba", torch.float32), tokens(time=7, dtype=torch.float32)
    state = mixer(x[:, :5], use_state=True).state
    before = mixer(x[:, 5:6], state=state, use_state=True).output
    change(mixer)
    after = mixer(x[:, 5:6], state=state, use_state=True).output
    pair = mixer(x[:, 5:], state=state, use_state=True).output[:, :1]
    torch.testing.assert_close(after, pair, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3)


def test_wrong_sizes_get_a_sentence():
    for name in ("expand", "state_size", "conv_size", "step_rank"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            make("mamba", **{name: 0})
    assert make("mamba").step_rank == math.ceil(DIM / 16)
