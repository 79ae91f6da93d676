"""Activation sparsity: closed forms, invariances, bounds that must be kept, and the fitted law."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.evaluation import sparsity
from subquad.evaluation.sparsity_law import fit_sparsity_law
from subquad.layers.feedforward_sites import feedforward_sites


def tiny(feedforward="reglu", layers=2):
    torch.manual_seed(0)
    config = SubquadConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, feedforward=feedforward
    )
    model = SubquadForCausalLM(config).eval()
    with torch.no_grad():  # as uneven as trained layers are
        for site in feedforward_sites(model):
            site.up.weight *= torch.linspace(0.1, 3, site.hidden)[:, None]
    return model


WINDOWS = [torch.randint(32, (4, 24), generator=torch.Generator().manual_seed(n)) for n in range(2)]


def error_of(model, thresholds):
    """The mean relative error that thresholds make in each layer, on the dense model's own inputs."""
    errors = []
    for site in feedforward_sites(model):
        seen = []
        handle = site.down.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            for window in WINDOWS:
                model(input_ids=window)
        handle.remove()
        h = torch.cat([x.flatten(0, -2) for x in seen])
        dropped = h * (h.abs() < thresholds.by_neuron[site.name])
        weight = site.down_weight
        errors.append(float(((dropped @ weight.mT).norm(dim=-1) / (h @ weight.mT).norm(dim=-1)).mean().detach()))
    return errors


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_thresholds_make_the_same_error_in_every_layer(error):
    model = tiny()
    thresholds = sparsity.cett_thresholds(model, WINDOWS, error)
    assert error_of(model, thresholds) == pytest.approx([error, error], abs=1e-3)


def test_the_ratio_falls_as_the_error_grows():
    model = tiny("swiglu")
    measures = [
        sparsity.measure(model, WINDOWS, sparsity.truncation(sparsity.cett_thresholds(model, WINDOWS, c)))
        for c in (0.01, 0.1, 0.3, 0.6)
    ]
    ratios = [m.ratio for m in measures]
    assert ratios == sorted(ratios, reverse=True)
    assert measures[-1].ratio < 0.5 * measures[0].ratio


def test_no_threshold_leaves_a_relu_model_as_it_is():
    model = tiny()
    sites = feedforward_sites(model)
    nothing = sparsity.Thresholds(0.0, {s.name: 0.0 for s in sites}, {s.name: torch.zeros(s.hidden) for s in sites})
    found = sparsity.measure(model, WINDOWS, sparsity.truncation(nothing))
    assert found.loss == found.dense_loss
    assert found.ratio == sparsity.measure(model, WINDOWS).ratio  # zeros count as inactive in both


def test_infinite_thresholds_leave_nothing():
    model = tiny(layers=1)
    (site,) = feedforward_sites(model)
    everything = sparsity.Thresholds(1.0, {site.name: torch.inf}, {site.name: torch.full((site.hidden,), torch.inf)})
    found = sparsity.measure(model, WINDOWS, sparsity.truncation(everything))
    with torch.no_grad():
        site.down.weight.zero_()
    assert found.ratio == 0
    assert found.never_active == 1
    assert found.loss == pytest.approx(sparsity.measure(model, WINDOWS).dense_loss, rel=1e-6)


def test_scaling_a_neuron_changes_nothing_that_is_active():
    model = tiny()
    before = sparsity.measure(model, WINDOWS, sparsity.truncation(sparsity.cett_thresholds(model, WINDOWS, 0.2)))
    with torch.no_grad():
        for site in feedforward_sites(model):
            factors = torch.linspace(0.25, 4, site.hidden)
            site.up.weight *= factors[:, None]
            site.down.weight /= factors
    after = sparsity.measure(model, WINDOWS, sparsity.truncation(sparsity.cett_thresholds(model, WINDOWS, 0.2)))
    assert after.by_layer == pytest.approx(before.by_layer, abs=1e-3)


def test_the_perplexity_bound_is_kept_and_used():
    model = tiny("swiglu")
    found = sparsity.perplexity_sparsity(model, WINDOWS, percent=0.05)
    assert found.measure.perplexity_increase <= 0.05
    assert found.measure.ratio < 1
    again = sparsity.measure(model, WINDOWS, sparsity.truncation(found.thresholds))
    assert again == found.measure
    assert any(m.perplexity_increase > 0.05 for c, m in found.curve if c > found.thresholds.error)


def test_rules_count_what_they_say():
    model = tiny(layers=1)
    (site,) = feedforward_sites(model)
    assert sparsity.measure(model, WINDOWS, sparsity.top_k(5)).ratio == pytest.approx(5 / site.hidden)
    zeros = sparsity.measure(model, WINDOWS, sparsity.zero()).ratio
    assert sparsity.measure(model, WINDOWS, sparsity.fat(0.0)).ratio == zeros
    assert sparsity.measure(model, WINDOWS, sparsity.fat(1e-3)).ratio < zeros


def test_padding_is_left_out():
    model = tiny()
    window = WINDOWS[0][:1]
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 6, dtype=torch.int64), window], 1),
        "attention_mask": torch.cat([torch.zeros(1, 6, dtype=torch.int64), torch.ones_like(window)], 1),
    }
    plain, with_padding = sparsity.measure(model, [window]), sparsity.measure(model, [padded])
    assert with_padding.by_layer == pytest.approx(plain.by_layer, abs=2e-3)
    assert with_padding.loss == pytest.approx(plain.loss, rel=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ),
        GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_inner=24)),
    ],
    ids=["llama", "gpt2"],
)
def test_layers_of_hugging_face_models_are_found(model):
    (site,) = feedforward_sites(model)
    assert site.hidden == 24
    assert site.down_weight.shape == (16, 24)
    thresholds = sparsity.cett_thresholds(model, WINDOWS, 0.3)
    assert 0 < sparsity.measure(model, WINDOWS, sparsity.truncation(thresholds)).ratio < 1


def test_bad_input_is_refused():
    model = tiny(layers=1)
    with pytest.raises(ValueError, match="no windows"):
        sparsity.measure(model, [])
    with pytest.raises(ValueError, match="T >= 2"):
        sparsity.measure(model, [torch.zeros(1, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        sparsity.cett_thresholds(model, WINDOWS, 1.0)
    with pytest.raises(ValueError, match="above 0"):
        sparsity.perplexity_sparsity(model, WINDOWS, 0.0)
    with pytest.raises(ValueError, match="modules: Linear"):
        sparsity.measure(torch.nn.Linear(2, 2), WINDOWS)
    with pytest.raises(ValueError, match="integer >= 1"):
        sparsity.top_k(0)


TOKENS = np.geomspace(5e9, 300e9, 10)


@pytest.mark.parametrize(("alpha", "k", "b", "limit"), [(0.101, 3.2, -0.0151, 0.0614), (1.53, 1.56e-4, -3.46, 0.0648)])
def test_published_falling_curves_are_recovered(alpha, k, b, limit):
    law = fit_sparsity_law(TOKENS, np.exp(-k * (TOKENS / 1e9) ** alpha + b) + limit, "relu")
    assert law.limit == pytest.approx(limit, rel=0.02)
    assert law.alpha == pytest.approx(alpha, rel=0.05)
    assert law.tokens_for(law.ratio(50e9)) == pytest.approx(50e9, rel=1e-4)


def test_a_noisy_rising_curve_is_recovered():
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(len(TOKENS))
    law = fit_sparsity_law(TOKENS, (0.39 - 0.208 / (TOKENS / 1e9) ** 0.844) * noise, "silu")
    assert law.limit == pytest.approx(0.39, rel=0.05)
    with pytest.raises(ValueError, match="never reaches"):
        law.tokens_for(0.9)


def test_laws_are_refused_where_none_fits():
    with pytest.raises(ValueError, match="at least 5"):
        fit_sparsity_law([1e9] * 4, [0.1] * 4, "relu")
    with pytest.raises(ValueError, match="'relu' or 'silu'"):
        fit_sparsity_law(TOKENS, [0.1] * 10, "gelu")
    with pytest.raises(ValueError, match="no silu law fits"):
        fit_sparsity_law(TOKENS, np.linspace(0.4, 0.1, 10), "silu")
