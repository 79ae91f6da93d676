"""Feed-forward layers by name: swiglu, sglu, reglu, fatreglu, gelu and relu are their formulas."""

import pytest
import torch
import torch.nn.functional as F

from subquad import feedforward


def fat(x):
    return torch.where(x >= 0.01, x, 0.0)


@pytest.mark.parametrize(
    ("name", "activation"), [("swiglu", F.silu), ("sglu", lambda x: x), ("reglu", F.relu), ("fatreglu", fat)]
)
def test_gated_layers_are_their_formula(name, activation):
    layer, x = feedforward.build(name, 6, 10), torch.randn(2, 3, 6)
    up, gate, down = (getattr(layer, f"{part}_proj").weight for part in ("up", "gate", "down"))
    torch.testing.assert_close(layer(x), (activation(x @ gate.T) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize(("name", "activation"), [("gelu", F.gelu), ("relu", F.relu)])
def test_plain_layers_are_their_formula(name, activation):
    layer, x = feedforward.build(name, 6, 10), torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), activation(x @ layer.up_proj.weight.T) @ layer.down_proj.weight.T)


def test_sglu_with_a_constant_gate_is_linear():
    layer, x, y = feedforward.build("sglu", 4, 4), *torch.randn(2, 3, 4)
    layer.gate_proj = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(layer.gate_proj.weight)
    torch.nn.init.ones_(layer.gate_proj.bias)
    torch.testing.assert_close(layer(x + y), layer(x) + layer(y))


def test_a_threshold_leaves_small_gates_out():
    layer = feedforward.build("fatreglu", 2, 2)
    with torch.no_grad():
        for projection in (layer.gate_proj, layer.up_proj, layer.down_proj):
            projection.weight.copy_(torch.eye(2))
    assert layer(torch.tensor([0.009, 0.02])).tolist() == pytest.approx([0.0, 0.0004])
    with pytest.raises(ValueError, match="negative"):
        type(layer)(2, 2, threshold=-1.0)


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'swiglu'"):
        feedforward.build("swiglue", 4, 8)
