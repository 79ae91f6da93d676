"""Feed-forward layers by name: swiglu, sglu, gelu and relu are their formulas."""

import pytest
import torch
import torch.nn.functional as F

from subquad import feedforward


@pytest.mark.parametrize(("name", "activation"), [("swiglu", F.silu), ("sglu", lambda x: x)])
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


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'swiglu'"):
        feedforward.build("swiglue", 4, 8)
