"""InLine attention: written out pair by pair with its local residual, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from subquad import SubquadConfig, SubquadForCausalLM, bench, mixers
from subquad.bench.distinct_queries import attention_weights
from subquad.mixers.inline import InLineAttention
from tests.mixers.cases import make, tokens

PHI = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: torch.exp(0.2 * x),
}


def inline(**options):
    return make("inline", **{"local": True, "kernel": "identity", **options})


def written_out(mixer, x, phi, grid, cls_tokens):
    """One image: explicit weights, one convolution per channel with kernels that head by head come from the mean."""
    q, k, v = (p(x).unflatten(-1, (4, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores = 8**-0.5 / len(x) * torch.einsum("ihk,jhk->hij", phi(q), phi(k))
    weights = scores - scores.mean(-1, keepdim=True) + 1 / len(x)
    o = torch.einsum("hij,jhv->ihv", weights, v).flatten(-2)
    first, second = mixer.residual[0], mixer.residual[2]
    local = torch.zeros_like(o)
    for head in range(4):
        inside, taps = slice(8 * head, 8 * head + 8), slice(72 * head, 72 * head + 72)
        pooled = F.gelu(first.weight[inside, :, 0] @ x.mean(0)[inside] + first.bias[inside])
        r = (second.weight[taps, :, 0] @ pooled + second.bias[taps]).view(8, 1, 3, 3)
        image = v[cls_tokens:, head].T.reshape(1, 8, *grid)
        local[cls_tokens:, inside] = F.conv2d(image, r, padding=1, groups=8)[0].flatten(1).T
    return mixer.o_proj(o + local)


@pytest.mark.parametrize("kernel", PHI)
@pytest.mark.parametrize("cls_tokens", [0, 3])
def test_it_is_the_weighted_mean_and_the_convolution_between_projections(kernel, cls_tokens):
    mixer, x = inline(kernel=kernel, cls_tokens=cls_tokens), tokens(time=20 + cls_tokens)
    assert isinstance(mixer, InLineAttention)
    output = mixer(x, grid=(4, 5)).output
    expected = torch.stack([written_out(mixer, row, PHI[kernel], (4, 5), cls_tokens) for row in x])
    torch.testing.assert_close(output, expected)


def test_class_tokens_get_no_residual():
    mixer, x = inline(cls_tokens=2), tokens(time=22)
    with torch.no_grad():
        plain = make("inline", kernel="identity")
        plain.load_state_dict(mixer.state_dict(), strict=False)
    output, without = mixer(x, grid=(4, 5)).output, plain(x).output
    torch.testing.assert_close(output[:, :2], without[:, :2])
    assert not torch.allclose(output[:, 2:], without[:, 2:])


def test_padding_leaves_means_and_convolution():
    mixer, x = inline(), tokens(time=20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 15:] = False  # the last row of the grid
    spoiled = x.clone()
    spoiled[:, 15:] = 1e3
    output = mixer(spoiled, mask=mask, grid=(4, 5)).output
    torch.testing.assert_close(output[:, :15], mixer(x[:, :15], grid=(3, 5)).output)
    assert not output[:, 15:].any()


def test_queries_of_one_call_are_read_alone():
    mixer, x, context = make("inline"), tokens(time=6), tokens(time=14, seed=1)
    torch.testing.assert_close(mixer(x[:, :3], context).output, mixer(x, context).output[:, :3])


def test_every_parameter_of_the_local_part_gets_a_gradient():
    mixer = inline(kernel="leaky_relu")
    mixer(tokens(time=20), grid=(4, 5)).output.cos().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in mixer.parameters())


def test_exp_stays_finite_in_half_precision():
    """exp(0.2 x) alone: at x = 60 beyond float16."""
    mixer = make("inline", torch.float16, kernel="exp")
    with torch.no_grad():
        mixer.k_proj.bias.fill_(60.0)
    assert mixer(tokens(dtype=torch.float16)).output.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, r"needs grid=\(height, width\)"),
        ({"grid": (4, 6)}, "holds 24 tokens; there are 20"),
        ({"grid": (20,)}, "grid must be"),
        ({"context": tokens(time=4)}, "does not serve non-causal cross-attention"),
        ({"cu_seqlens": torch.tensor([0, 20])}, "local=False"),
    ],
)
def test_what_it_refuses(call, message):
    x = tokens(time=20, batch=1 if "cu_seqlens" in call else 2)
    with pytest.raises(ValueError, match=message):
        inline()(x, **call)


def test_wrong_options_get_a_sentence():
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        inline(kernel="relus")
    with pytest.raises(ValueError, match="cls_tokens"):
        inline(cls_tokens=-1)
    with pytest.raises(ValueError, match="0 with local=False"):
        inline(cls_tokens=1, local=False)


def test_few_keys_are_warned_of():
    with pytest.warns(UserWarning, match="8 keys cannot span heads of width 8"):
        make("inline")(tokens(time=8))


def test_a_causal_language_model_is_refused_with_what_it_serves():
    with pytest.raises(ValueError, match="causal=True serves no use; it serves non-causal cross"):
        SubquadForCausalLM(SubquadConfig(mixers="inline", vocab_size=16, hidden_size=32, num_hidden_layers=1))


def test_injectivity_tells_inline_from_linear_attention():
    found = bench.injectivity(make("inline", kernel="identity"))
    assert found.smallest_distance > 1e-3
    assert found.ray_distance > 1e-3
    assert (found.key_rank, found.key_width) == (8, 8)
    few = bench.injectivity(make("inline", kernel="identity"), tokens=8)
    assert few.key_rank == 7
    linear = bench.injectivity(make("linear", feature_map="relu"))
    assert linear.ray_distance == 0
    assert bench.injectivity(make("softmax")).ray_distance > 0
    with pytest.raises(ValueError, match="shows no weights"):
        bench.injectivity(make("gla"))
    with pytest.raises(ValueError, match=r"x must be \(1, at least 2 rows, 32\)"):
        bench.injectivity(make("inline"), tokens(batch=2))


@pytest.mark.parametrize("name", ["inline", "linear"])
def test_the_weights_are_those_of_the_mixer(name):
    mixer, x = make(name, causal=False), tokens()
    q, k, v = mixer.project(x, x)
    mixed = torch.einsum("bhij,bjhv->bihv", attention_weights(mixer, q, k), v).flatten(-2)
    torch.testing.assert_close(mixer.o_proj(mixed), mixer(x).output, rtol=1e-5, atol=1e-5)


def test_available_asks_by_pattern():
    assert "inline" in mixers.available("non-causal self-attention")
    assert "inline" not in mixers.available("causal self-attention")
    with pytest.raises(ValueError, match="did you mean 'causal self-attention'"):
        mixers.available("causal self")


def test_queries_without_a_feature_weigh_nothing():
    linear = make("linear", feature_map="relu")
    with torch.no_grad():  # relu of every query is zero
        linear.q_proj.weight.zero_()
    found = bench.injectivity(linear)
    assert (found.smallest_distance, found.ray_distance) == (0, 0)
