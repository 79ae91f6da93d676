"""How far models look, on models whose attention is known, and how even their gradients are."""

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.bench.attention_mass import attention_mass, gradient_norms, layer_table, mass_distances
from subquad.training import Batch

TOKENS = torch.randint(0, 16, (2, 40), generator=torch.Generator().manual_seed(0))


def model(mixers, **fields):
    torch.manual_seed(0)
    layers = 2 if isinstance(mixers, dict) and "name" not in mixers else 1
    small = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "vocab_size": 16}
    return SubquadForCausalLM(SubquadConfig(mixers=mixers, **{**small, "positions": "none", **fields})).eval()


def silence_queries(model):
    """Scores of 0 (softmax) or constant features (1 + elu of 0): the attention is uniform."""
    for mixer in model.model.mixers():
        for proj in (mixer.q_proj, mixer.k_proj):
            torch.nn.init.zeros_(proj.weight)
            if proj.bias is not None:
                torch.nn.init.zeros_(proj.bias)
    return model


def test_distances_of_known_weights():
    last_token = torch.eye(5)
    assert mass_distances(last_token, 0.8).tolist() == [0] * 5
    first_token = torch.zeros(5, 5)
    first_token[:, 0] = 1
    assert mass_distances(first_token, 0.8).tolist() == [0, 1, 2, 3, 4]
    uniform = torch.ones(10, 10).tril()
    # of i + 1 equal weights the nearest ceil(0.8 (i + 1)) hold 80%
    assert mass_distances(uniform, 0.8).tolist() == [-(-8 * (i + 1) // 10) - 1 for i in range(10)]
    assert mass_distances(uniform, 1.0).tolist() == list(range(10))


@pytest.mark.parametrize("mixer", ["linear", "norm_attention", "softmax"])
def test_uniform_attention_needs_most_of_the_window(mixer):
    found = attention_mass(silence_queries(model(mixer)), TOKENS)
    expected = sum(-(-8 * (i + 1) // 10) - 1 for i in range(20, 40)) / 20
    assert found[0].distance == pytest.approx(expected)


def test_blocks_and_windows_bound_the_distance():
    diagonal = attention_mass(silence_queries(model({"name": "diag_attention", "block_size": 10})), TOKENS)[0]
    expected = sum(-(-8 * (i % 10 + 1) // 10) - 1 for i in range(20, 40)) / 20
    assert diagonal.distance == pytest.approx(expected)
    window = attention_mass(silence_queries(model({"name": "sliding_window", "window_size": 5})), TOKENS)[0]
    assert window.distance == pytest.approx(3)  # 4 of 5 equal weights


def test_weights_are_those_that_the_mixer_uses():
    """Reading values with the reported weights gives the mixer's own output."""
    from subquad.bench.attention_mass import WEIGHTS

    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    for name, fields in (("softmax", {"positions": "rope"}), ("diag_attention", {}), ("linear", {})):
        mixer = model(name, **fields).model.mixers()[0]
        weights = next(read for kind, read in WEIGHTS.items() if isinstance(mixer, kind))(mixer, x)
        weights = weights / weights.sum(-1, keepdim=True)
        values = mixer.v_proj(x).unflatten(-1, (2, -1))
        output = mixer.o_proj(torch.einsum("bhij,bjhv->bihv", weights, values).flatten(-2))
        torch.testing.assert_close(mixer(x).output, output, rtol=1e-4, atol=1e-5)


def test_layers_are_reported_in_order():
    found = attention_mass(model({"first": "diag_attention", "rest": "norm_attention"}), TOKENS)
    assert [(row.layer, row.mixer) for row in found] == [(0, "DiagAttention"), (1, "NormAttention")]
    assert len(layer_table(found).rows) == 2


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"name": "norm_attention", "feature_map": "elu"}, "signed"),
        ({"name": "diag_attention", "weights": "relu"}, "weights='relu'"),
        ("gla", "GatedLinearAttention has no attention weights"),
    ],
)
def test_signed_or_missing_weights_are_refused(mixer, message):
    with pytest.raises(ValueError, match=message):
        attention_mass(model(mixer, initializer_range=1.0), TOKENS)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="share"):
        attention_mass(model("softmax"), TOKENS, share=1.2)


def test_gradient_norms_are_those_of_the_loss():
    subject = model({"first": "linear", "rest": "norm_attention"})
    batches = [Batch(TOKENS[:, i : i + 8], TOKENS[:, i + 1 : i + 9]) for i in (0, 8, 16)]
    found = gradient_norms(subject, batches)
    assert all(parameter.grad is None for parameter in subject.parameters())
    norms = []
    for batch in batches:
        subject.zero_grad()
        subject.loss_from_labels(*batch).backward()
        grads = [p.grad.flatten() for p in subject.model.mixers()[1].parameters()]
        norms.append(float(torch.cat(grads).norm()))
    norms = torch.tensor(norms)
    assert found[1].mean == pytest.approx(float(norms.mean()), rel=1e-4)
    assert found[1].relative_spread == pytest.approx(float(norms.std() / norms.mean()), rel=1e-3)


def test_equal_batches_have_no_spread_and_one_batch_is_refused():
    batch = Batch(TOKENS[:, :8], TOKENS[:, 1:9])
    assert gradient_norms(model("linear"), [batch, batch])[0].relative_spread == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two batches"):
        gradient_norms(model("linear"), [batch])
