"""The baselines that are no option of the library: each is what its name says."""

import math

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM, mixers, ops
from subquad.claims.deltanet import AdditiveLinearAttention, WeightedLinearAttention
from subquad.claims.experiment import replace_mixers, replace_submodules
from subquad.claims.flowformer import GatedFlow, NoAllocation, NoCompetition
from subquad.claims.gla import ConstantGate, ScalarGate
from subquad.claims.hedgehog import linear_copy
from subquad.claims.lightning2 import cumulative_attention
from subquad.claims.transnormer import normed_row, scaled_row
from subquad.claims.transnormerllm import GatedSoftmaxAttention
from subquad.mixers.gla import GatedLinearAttention


@pytest.fixture
def x():
    return torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))


def test_a_constant_gate_is_a_fixed_decay(x):
    torch.manual_seed(0)
    mixer = GatedLinearAttention(32, 4)
    slopes = torch.tensor([0.25, 0.01, 1.0, 0.0])
    mixer.gk_proj = ConstantGate(mixer, slopes)
    log_decay = torch.nn.functional.logsigmoid(mixer.gk_proj(x)) / mixer.gate_temperature
    expected = -slopes.repeat_interleave(mixer.head_k_dim).expand(2, 12, -1)
    torch.testing.assert_close(log_decay, expected, rtol=1e-5, atol=1e-7)

    # and the whole mixer is then lightning attention inside GLA's block
    q, k, v = (proj(x).unflatten(-1, (4, -1)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    o, _ = ops.lightning_attention(q, k, v, slopes, scale=mixer.head_k_dim**-0.5, backend="reference")
    gate = torch.nn.functional.silu(mixer.g_proj(x)).unflatten(-1, (4, -1))
    torch.testing.assert_close(
        mixer(x).output, mixer.o_proj((mixer.o_norm(o) * gate).flatten(-2)), rtol=1e-4, atol=1e-5
    )


def test_a_scalar_gate_is_one_number_per_head_from_the_token(x):
    torch.manual_seed(0)
    mixer = GatedLinearAttention(32, 4)
    gates = ScalarGate(mixer)(x).unflatten(-1, (4, -1))
    assert torch.equal(gates, gates[..., :1].expand_as(gates))
    assert gates[..., 0].flatten(0, 1).std(0).min() > 0


def test_the_additive_baseline_never_erases():
    """Two writes under one key: DeltaNet with beta 1 keeps the newer value, the additive forms their sum."""
    torch.manual_seed(0)
    additive = AdditiveLinearAttention(8, 1, conv_size=0)
    q = k = torch.nn.functional.normalize(torch.ones(1, 2, 1, 8), dim=-1)
    v = torch.randn(1, 2, 1, 8)
    beta = torch.tensor([[[0.5], [1.0]]])
    request = mixers.contract.Request(use_state=True)
    _, state = additive._update(torch.zeros(1, 2, 8), q, k, v, beta, None, request)
    read = torch.einsum("bhkv,bhk->bhv", state, k[:, 0])
    torch.testing.assert_close(read, v.sum(1), rtol=1e-5, atol=1e-6)
    weighted = WeightedLinearAttention(8, 1, conv_size=0)
    _, state = weighted._update(torch.zeros(1, 2, 8), q, k, v, beta, None, request)
    read = torch.einsum("bhkv,bhk->bhv", state, k[:, 0])
    torch.testing.assert_close(read, v[:, 0] / 2 + v[:, 1], rtol=1e-5, atol=1e-6)
    delta = mixers.build("delta_net", 8, num_heads=1, conv_size=0)
    _, state = delta._update(torch.zeros(1, 2, 8), q, k, v, beta, None, request)
    torch.testing.assert_close(torch.einsum("bhkv,bhk->bhv", state, k[:, 0]), v[:, 1], rtol=1e-5, atol=1e-6)


def test_gated_softmax_with_an_open_gate_is_softmax(x):
    torch.manual_seed(0)
    gated = GatedSoftmaxAttention(32, 4, layer_index=0, num_layers=1)
    plain = mixers.build("softmax", 32, num_heads=4)
    plain.load_state_dict(
        {name: gated.state_dict()[name.replace("o_proj", "gated_proj")] for name in plain.state_dict()}
    )

    class Open(torch.nn.Module):
        def forward(self, x):
            return torch.full_like(x, 1.2784645427610738)  # SiLU of it is 1

    gated.u_proj = Open()
    torch.testing.assert_close(gated(x).output, plain(x).output, rtol=1e-4, atol=1e-6)


def test_the_cumulative_sum_is_causal_linear_attention():
    q, k, v = torch.randn(3, 2, 9, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, _ = ops.linear_attention(q, k, v, backend="reference")
    torch.testing.assert_close(cumulative_attention(q, k, v), expected)


def test_scaling_the_scores_scales_one_gradient_and_not_the_other():
    """The normaliser divides the scale out of the output, so its gradient grows as the scores shrink; the norm's is
    bounded by |v| / sqrt(eps)."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    for row in (scaled_row, normed_row):
        torch.testing.assert_close(row(scores * 100, values), row(scores, values), rtol=1e-3, atol=1e-3)
    gradient = torch.autograd.functional.jacobian(lambda s: normed_row(s, values), scores * 1e-12)
    torch.testing.assert_close(gradient, values.T / math.sqrt(1e-6), rtol=1e-6, atol=1e-6)


def test_flow_attention_without_a_gate_is_what_its_name_says(x):
    torch.manual_seed(0)
    whole = mixers.build("flow", 32, num_heads=4)
    q, k, v = whole._project(x, x)
    plain, _ = ops.linear_attention(q, k, v, normalize=True)

    def output(kind):
        gated = kind(32, 4)
        gated.load_state_dict(whole.state_dict())
        return gated(x).output

    torch.testing.assert_close(output(GatedFlow), whole.o_proj(plain.flatten(-2)), rtol=1e-4, atol=1e-5)

    class Both(GatedFlow):
        compete = allocate = True

    torch.testing.assert_close(output(Both), whole(x).output, rtol=1e-4, atol=1e-5)
    for kind in (NoCompetition, NoAllocation):
        assert not torch.allclose(output(kind), output(Both), rtol=1e-3)
        assert not torch.allclose(output(kind), output(GatedFlow), rtol=1e-3)


def test_a_converted_model_keeps_all_but_its_softmax():
    teacher = SubquadForCausalLM(
        SubquadConfig(
            mixers=["base_conv", "softmax"], hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
        )
    )
    student = linear_copy(teacher, "hedgehog_softmax")
    assert [type(mixer).__name__ for mixer in student.model.mixers()] == ["BaseConv", "LinearAttention"]
    weights = student.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    assert all(".phi." in name for name in set(weights) - set(teacher.state_dict()))


def test_edits_replace_in_every_layer_and_initialise_as_the_model():
    config = SubquadConfig(
        mixers="gla", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=16, initializer_range=0.5
    )
    model = SubquadForCausalLM(config)
    replace_submodules("gk_proj", ScalarGate)(model)
    gates = [mixer.gk_proj for mixer in model.model.mixers()]
    assert all(isinstance(gate, ScalarGate) for gate in gates)
    assert 0.4 < torch.cat([gate.proj[0].weight.flatten() for gate in gates]).std() < 0.6
    assert all(gate.proj[1].bias.abs().max() == 0 for gate in gates)
    with pytest.raises(ValueError, match="no submodule 'gates'"):
        replace_submodules("gates", ScalarGate)(model)

    replace_mixers(lambda mixer: mixers.build("linear", mixer.dim, num_heads=mixer.num_heads))(model)
    assert [type(mixer).__name__ for mixer in model.model.mixers()] == ["LinearAttention"] * 2
    assert 0.4 < model.model.mixers()[1].q_proj.weight.std() < 0.6
    assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 16)
