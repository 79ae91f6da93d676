"""Which weights decay, and which learning rate each step uses."""

import math

import pytest
import torch
from torch import nn

from subquad.training import adamw, learning_rate_schedule, parameter_groups


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.projection = nn.Linear(4, 4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.grid_norm = nn.LayerNorm((3, 4))
        self.log_decay = nn.Parameter(torch.zeros(4))
        self.marked = nn.Parameter(torch.zeros(4, 4))
        self.marked._no_weight_decay = True
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.head_bias = nn.Parameter(torch.zeros(2, 4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_biases_norms_embeddings_and_marked_parameters_do_not_decay():
    groups = parameter_groups(Everything(), 0.3)
    names = [{name for name, _ in group["params"]} for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert names[0] == {"projection.weight", "convolution.weight"}
    assert names[1] == {
        "embedding.weight",
        "projection.bias",
        "convolution.bias",
        "grid_norm.weight",
        "grid_norm.bias",
        "log_decay",
        "marked",
        "head_bias",
    }


def test_decay_pulls_only_what_decays(options, counted_data, quiet_train):
    """Under a constant loss a step multiplies decayed weights by 1 - rate * decay, and leaves the others."""

    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

    model = Still()
    weight, bias = model.linear.weight.clone(), model.linear.bias.clone()
    chosen = options(steps=3, warmup_steps=0, schedule="constant", learning_rate=0.25, weight_decay=0.5)
    quiet_train(
        model, counted_data(), chosen, objective=lambda m, b: (0 * (m.linear.weight.sum() + m.linear.bias.sum()), {})
    )
    torch.testing.assert_close(model.linear.weight, weight * (1 - 0.125) ** 3, rtol=1e-14, atol=0)
    assert torch.equal(model.linear.bias, bias)


def test_nothing_to_train_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="no parameter of this TinyModel requires a gradient"):
        parameter_groups(tiny_model().requires_grad_(False), 0.1)


def rates(options):
    optimizer = adamw(nn.Linear(2, 2), options)
    scheduler = learning_rate_schedule(optimizer, options)
    seen = []
    for _ in range(options.steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_then_cosine(options):
    seen = rates(options(steps=8, warmup_steps=3, learning_rate=0.9, final_learning_rate=0.1))
    cosine = [0.1 + 0.4 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    assert seen == pytest.approx([0.3, 0.6, 0.9, *cosine], rel=1e-12)


def test_warmup_then_constant(options):
    assert rates(options(steps=6, warmup_steps=2, schedule="constant", learning_rate=0.5)) == [
        0.25,
        0.5,
        0.5,
        0.5,
        0.5,
        0.5,
    ]


def test_one_cycle_peaks_after_the_warmup(options):
    seen = rates(options(steps=20, warmup_steps=6, schedule="one_cycle", learning_rate=0.5))
    assert max(seen) == pytest.approx(0.5)
    assert seen.index(max(seen)) == 5
    assert seen[:6] == sorted(seen[:6])
    assert seen[5:] == sorted(seen[5:], reverse=True)
    assert 0 < seen[-1] < 1e-4


def test_records_hold_the_rate_that_the_step_used(tiny_model, counted_data, options, quiet_train):
    chosen = options(steps=8, warmup_steps=3, learning_rate=0.9)
    result = quiet_train(tiny_model(), counted_data(), chosen)
    assert [record["learning_rate"] for record in result.history] == rates(chosen)
