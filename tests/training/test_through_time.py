"""Truncated and online gradients equal those of whole sequences where they should, and reach as far as they should."""

import pytest
import torch

from subquad import mixers
from subquad.training import RTRL, TruncatedBPTT, gradient_flow


def loss(output, target):
    return (output - target).square().sum()


def draw(time=12, dim=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, time, dim, generator=generator, dtype=torch.float64)


def network(name="elman", dim=4, **options):
    torch.manual_seed(1)
    return mixers.build(name, dim, **options).double()


def gradients(mixer):
    found = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    return found


@pytest.mark.parametrize("name", ["elman", "lstm", "gla"])
def test_truncation_at_the_whole_length_is_back_propagation(name):
    mixer = network(name) if name != "gla" else network(name, num_heads=2)
    x, targets = draw()
    loss(mixer(x).output, targets).backward()
    expected = gradients(mixer)
    for k1 in (12, 5):
        values, _ = TruncatedBPTT(mixer, loss, k1, 12).run(x, targets)
        assert len(values) == -(-12 // k1)
        for a, b in zip(gradients(mixer), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 3), (2, 5), (4, 4)])
def test_each_loss_goes_back_k2_steps_and_no_further(k1, k2):
    mixer = network()
    x, targets = draw()
    total = 0.0
    for begin in range(0, 12, k1):
        end = min(begin + k1, 12)
        first = max(0, end - k2)
        state = mixer(x[:, :first], use_state=True).state if first else mixer.init_state(3, x.dtype, "cpu")
        state = type(state)(*(leaf.detach() for leaf in state))
        output = mixer(x[:, first:end], state=state).output[:, begin - first :]
        total = total + loss(output, targets[:, begin:end])
    total.backward()
    expected = gradients(mixer)
    values, state = TruncatedBPTT(mixer, loss, k1, k2).run(x, targets)
    for a, b in zip(gradients(mixer), expected):
        torch.testing.assert_close(a, b)
    assert sum(values) == pytest.approx(float(total.detach()))
    assert not any(leaf.requires_grad for leaf in state)
    torch.testing.assert_close(state.hidden, mixer(x, use_state=True).state.hidden)


def test_states_are_carried_over_pieces_and_updates_are_called():
    mixer, calls = network("lstm"), []
    x, targets = draw()
    learner = TruncatedBPTT(mixer, loss, 3, 3)
    _, state = learner.run(x[:, :6], targets[:, :6], update=lambda: calls.append(1))
    _, after = learner.run(x[:, 6:], targets[:, 6:], state=state)
    assert len(calls) == 2
    torch.testing.assert_close(after.cell, mixer(x, use_state=True).state.cell)
    for k1, k2 in ((0, 1), (3, 2)):
        with pytest.raises(ValueError, match="k2 at least k1"):
            TruncatedBPTT(mixer, loss, k1, k2)
    with pytest.raises(ValueError, match="targets must have"):
        learner.run(x, targets[:, :5])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_online_learning_equals_back_propagation(activation):
    mixer = network(activation=activation)
    x, weight = draw(time=20)
    (mixer(x).output * weight).sum().backward()
    expected = gradients(mixer)
    learner = RTRL(mixer)
    for _ in range(2):  # a second sequence after a reset knows nothing of the first
        for x_t, weight_t in zip(x.unbind(1), weight.unbind(1)):
            learner.step(x_t)
            learner.accumulate(weight_t)
        for a, b in zip(gradients(mixer), expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        learner.reset()
    with pytest.raises(ValueError, match="no h_t yet"):
        learner.accumulate(weight[:, 0])
    with pytest.raises(TypeError, match="Elman"):
        RTRL(network("gru"))


def test_the_gradient_of_a_linear_unit_falls_as_its_weight_s_power():
    mixer = network("elman", 1, activation="relu")  # linear while its unit is positive
    with torch.no_grad():
        for name, parameter in mixer.cell.layer.named_parameters():
            parameter.fill_({"weight_ih_l0": 1.0, "weight_hh_l0": 0.7}.get(name, 0.0))
    flow = gradient_flow(mixer, torch.ones(1, 25, 1, dtype=torch.float64))
    torch.testing.assert_close(flow, 0.7 ** torch.arange(25, dtype=torch.float64))


def test_forget_gates_carry_gradients_further():
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, long = (gradient_flow(network("lstm", 8, forget_bias=bias), x) for bias in (0.0, 3.0))
    assert long[-1] / long[0] > 100 * short[-1] / short[0]
    far = gradient_flow(network("lstm", 8), x, lambda hidden: hidden[:, 0].sum())
    assert far.shape == (40,)
