"""State tracking: the table, and the eigenvalues that models with known weights use."""

import math

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM, tasks
from subquad.bench.state_tracking import eigenvalue_report, state_tracking, state_tracking_table

TOKENS = torch.zeros(2, 6, dtype=torch.int64)
SHORT = {"train_length": 8, "test_lengths": [8, 16], "steps": 8, "batch_size": 4}


def model(mixers):
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4}
    return SubquadForCausalLM(SubquadConfig(mixers=mixers, positions="none", **fields)).eval()


def test_every_mixer_task_and_seed_is_a_row():
    mixers = {"positive": "delta_net", "negative": {"name": "delta_net", "eigenvalues": [-1, 1]}}
    rows = state_tracking(mixers, ["parity", tasks.get("group_word", group="Z3")], seeds=(0, 1), **SHORT)
    assert [(row.task, row.mixer, row.seed) for row in rows] == [
        (task, mixer, seed) for task in ("parity", "group_word") for mixer in mixers for seed in (0, 1)
    ]
    for row in rows:
        assert list(row.scaled_accuracy) == [8, 16]
        assert all(-1 <= value <= 1 for value in row.scaled_accuracy.values())
    assert len(state_tracking_table(rows).rows) == len(rows)


def test_the_same_seed_gives_the_same_row():
    assert state_tracking(["gla"], seeds=[3], **SHORT) == state_tracking(["gla"], seeds=[3], **SHORT)


def test_lengths_that_a_task_cannot_fill_are_refused():
    with pytest.raises(ValueError, match="modular_arithmetic has lengths"):
        state_tracking(["gla"], ["modular_arithmetic"], **{**SHORT, "test_lengths": [9]})


@pytest.mark.parametrize(("low", "expected"), [(0, 0.5), (-1, 0.0)])
def test_at_zero_weights_beta_is_half_its_range(low, expected):
    subject = model({"name": "delta_net", "eigenvalues": [low, 1]})
    torch.nn.init.zeros_(subject.model.mixers()[0].b_proj.weight)
    (layer,) = eigenvalue_report(subject, TOKENS)
    assert layer.values.shape == (2 * 6 * 2,)
    torch.testing.assert_close(layer.values, torch.full_like(layer.values, expected))
    shares, edges = layer.histogram(4)
    assert edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert shares.sum() == pytest.approx(1)
    assert layer.negative_share == 0


def test_reflections_are_negative():
    subject = model({"name": "delta_product", "num_householder": 2})
    mixer = subject.model.mixers()[0]
    mixer.b_proj = torch.nn.Linear(16, 4)
    torch.nn.init.zeros_(mixer.b_proj.weight)
    torch.nn.init.constant_(mixer.b_proj.bias, 20.0)  # beta = 2
    (layer,) = eigenvalue_report(subject, TOKENS)
    assert layer.negative_share == 1
    torch.testing.assert_close(layer.values, -torch.ones_like(layer.values))


def test_a_gated_update_s_eigenvalue_is_the_decay_times_the_erasure():
    for name in ("gated_delta_net", {"name": "delta_product", "gated": True, "num_householder": 1}):
        subject = model(name)
        mixer = subject.model.mixers()[0]
        torch.nn.init.zeros_(mixer.b_proj.weight)
        torch.nn.init.zeros_(mixer.gate.proj.weight)
        with torch.no_grad():
            mixer.gate.A_log.fill_(math.log(2))
            mixer.gate.dt_bias.fill_(0.0)  # softplus of it is log 2
        (layer,) = eigenvalue_report(subject, TOKENS)
        decay = math.exp(-2 * math.log(2))
        torch.testing.assert_close(layer.values, torch.full_like(layer.values, decay * (1 - mixer.largest_beta / 2)))


def test_gates_and_constant_decays():
    (gates,) = eigenvalue_report(model("gla"), TOKENS)
    assert gates.values.shape == (2 * 6 * 8,)
    assert gates.values.min() > 0
    assert gates.values.max() < 1
    (constant,) = eigenvalue_report(model({"name": "lightning", "slopes": [0.0, 1.0]}), TOKENS)
    torch.testing.assert_close(constant.values, torch.tensor([1.0, math.exp(-1)]))
    assert eigenvalue_report(model("linear"), TOKENS)[0].values.tolist() == [1, 1]


def test_mixers_without_transitions_are_refused():
    with pytest.raises(ValueError, match="SoftmaxAttention has no state transition"):
        eigenvalue_report(model("softmax"), TOKENS)
    with pytest.raises(ValueError, match="qk_norm"):
        eigenvalue_report(model({"name": "delta_net", "qk_norm": "sum", "qk_activation": "relu"}), TOKENS)
