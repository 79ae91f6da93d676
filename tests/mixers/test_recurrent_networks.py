"""The recurrent networks are torch's where they are the same, and their definitions where torch has none."""

import pytest
import torch
from torch import nn

from subquad import mixers
from subquad.mixers import Bidirectional
from tests.mixers.cases import DIM, make, tokens


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("elman", {}, nn.RNN),
        ("elman", {"activation": "relu"}, lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)),
        ("lstm", {}, nn.LSTM),
        ("gru", {}, nn.GRU),
    ],
)
def test_equal_torch_s_layers_forward_and_backward(name, options, layer):
    mixer, x = make(name, **options), tokens().requires_grad_()
    expected = layer(DIM, DIM, batch_first=True).double()
    expected.load_state_dict(mixer.cell.layer.state_dict())
    output, wanted = mixer(x).output, expected(x)[0]
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(output.sin().sum(), [x, *mixer.cell.layer.parameters()])
    for a, b in zip(found, torch.autograd.grad(wanted.sin().sum(), [x, *expected.parameters()])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_peepholes_of_zero_are_an_lstm():
    plain, peephole, x = make("lstm"), make("lstm", peephole=True), tokens()
    torch_layer, cell = plain.cell.layer, peephole.cell
    with torch.no_grad():
        cell.input.weight.copy_(torch_layer.weight_ih_l0)
        cell.input.bias.copy_(torch_layer.bias_ih_l0 + torch_layer.bias_hh_l0)
        cell.recurrent.weight.copy_(torch_layer.weight_hh_l0)
    torch.testing.assert_close(peephole(x).output, plain(x).output)
    with torch.no_grad():
        cell.peepholes.normal_()
    # one step by hand: i and f see the old memory, o the new one
    state = peephole(x[:, :5], use_state=True).state
    i, f, g, o = (cell.input(x[:, 5]) + cell.recurrent(state.hidden)).chunk(4, -1)
    memory = torch.sigmoid(f + cell.peepholes[1] * state.cell) * state.cell
    memory = memory + torch.sigmoid(i + cell.peepholes[0] * state.cell) * torch.tanh(g)
    hidden = torch.sigmoid(o + cell.peepholes[2] * memory) * torch.tanh(memory)
    torch.testing.assert_close(peephole(x[:, 5:6], state=state).output[:, 0], hidden)


@pytest.mark.parametrize("peephole", [False, True])
def test_an_open_forget_gate_is_the_cell_of_1997(peephole):
    old, new, x = make("lstm", forget_gate=False, peephole=peephole), make("lstm", peephole=True), tokens()
    with torch.no_grad():
        for target, source in (
            (new.cell.input.weight, old.cell.input.weight),
            (new.cell.input.bias, old.cell.input.bias),
        ):
            i, g, o = source.chunk(3)
            target.copy_(torch.cat([i, torch.zeros_like(i), g, o]))
        new.cell.input.bias[DIM : 2 * DIM] = 1e3
        i, g, o = old.cell.recurrent.weight.chunk(3)
        new.cell.recurrent.weight.copy_(torch.cat([i, torch.zeros_like(i), g, o]))
        if peephole:
            old.cell.peepholes.normal_()
            new.cell.peepholes[::2] = old.cell.peepholes
    torch.testing.assert_close(old(x).output, new(x).output)


def test_the_reset_gate_before_the_product_by_hand():
    mixer, x = make("gru", reset_after=False), tokens()
    cell, h, outputs = mixer.cell, torch.zeros(2, DIM, dtype=torch.float64), []
    for x_t in x.unbind(1):
        r, z, n = cell.input(x_t).chunk(3, -1)
        from_h = cell.gates(h).chunk(2, -1)
        r, z = torch.sigmoid(r + from_h[0]), torch.sigmoid(z + from_h[1])
        h = (1 - z) * torch.tanh(n + cell.candidate(r * h)) + z * h
        outputs.append(h)
    torch.testing.assert_close(mixer(x).output, torch.stack(outputs, 1))


def test_a_jordan_network_that_outputs_its_units_is_an_elman_network():
    jordan, elman, x = make("jordan", self_link=0.0), make("elman"), tokens()
    with torch.no_grad():
        jordan.cell.output.weight.copy_(torch.eye(DIM))
        jordan.cell.output.bias.zero_()
        layer = elman.cell.layer
        jordan.cell.input.weight.copy_(layer.weight_ih_l0)
        jordan.cell.input.bias.copy_(layer.bias_ih_l0 + layer.bias_hh_l0)
        jordan.cell.context.weight.copy_(layer.weight_hh_l0)
    torch.testing.assert_close(jordan(x).output, elman(x).output)
    jordan.cell.self_link = 0.5
    y = jordan(x[:, :2], use_state=True)
    torch.testing.assert_close(y.state.context, 0.5 * y.output[:, 0] + y.output[:, 1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lstm", {"peephole": True}),
        ("lstm", {"forget_gate": False}),
        ("gru", {"reset_after": False, "hidden_size": 5}),
        ("lstm", {"hidden_size": 7}),
    ],
)
def test_packing_padding_and_states_hold_for_every_cell(name, options):
    mixer, x = make(name, **options), tokens()
    whole = mixer(x, use_state=True)
    head = mixer(x[:, :9], use_state=True)
    tail = mixer(x[:, 9:], state=head.state, use_state=True)
    torch.testing.assert_close(torch.cat([head.output, tail.output], 1), whole.output)
    offsets = torch.tensor([0, 4, 4, 23])
    packed = mixer(x[:1], cu_seqlens=offsets, use_state=True)
    alone = mixer(x[:1, 4:], use_state=True)
    torch.testing.assert_close(packed.output[:, 4:], alone.output)
    torch.testing.assert_close(packed.state[0][2:], alone.state[0])
    assert bool((packed.state[0][1] == 0).all())
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 3:8] = mask[1, 20:] = False
    padded = mixer(x, mask=mask, use_state=True)
    torch.testing.assert_close(padded.output[0, mask[0]], mixer(x[:1, mask[0]]).output[0])
    torch.testing.assert_close(padded.state[0][1:], mixer(x[1:, :20], use_state=True).state[0])


def test_a_row_of_padding_alone_keeps_its_state():
    mixer, x = make("lstm"), tokens()
    state = mixer(x, use_state=True).state
    mask = torch.zeros(2, 23, dtype=torch.bool)
    mask[1] = True
    after = mixer(x, mask=mask, state=state, use_state=True).state
    torch.testing.assert_close(after.cell[0], state.cell[0])
    assert not torch.allclose(after.cell[1], state.cell[1])


def test_starts_of_the_weights():
    lstm = make("lstm", torch.float32, forget_bias=2.0).cell.layer
    total = lstm.bias_ih_l0 + lstm.bias_hh_l0
    assert bool((total[DIM : 2 * DIM] == 2).all())
    identity = make("elman", recurrent_init="identity", activation="relu").cell.layer.weight_hh_l0
    assert torch.equal(identity, torch.eye(DIM, dtype=torch.float64))
    orthogonal = make("elman", recurrent_init="orthogonal").cell.layer.weight_hh_l0
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(DIM, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "gla"])
def test_two_directions_start_at_each_sequence_s_own_ends(name):
    both, x = Bidirectional(make(name), mixers.build(name, DIM, num_heads=4).double()).double(), tokens()
    expected = both.backward_mixer(x.flip(1)).output.flip(1)
    ahead, back = both.directions(x)
    torch.testing.assert_close(ahead, both.forward_mixer(x).output)
    torch.testing.assert_close(back, expected)
    whole = both(x).output
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 11:] = mask[1, :6] = False
    padded = both(x, mask=mask).output
    torch.testing.assert_close(padded[0, :11], both(x[:1, :11]).output[0])
    torch.testing.assert_close(padded[1, 6:], both(x[1:, 6:]).output[0])
    assert bool((padded[~mask] == 0).all())
    packed = both(x[:1], cu_seqlens=torch.tensor([0, 7, 7, 23])).output
    torch.testing.assert_close(packed[:, :7], both(x[:1, :7]).output)
    torch.testing.assert_close(packed[:, 7:], both(x[:1, 7:]).output)
    # a reversed input gives the reversed outputs with the halves swapped
    swapped = Bidirectional(both.backward_mixer, both.forward_mixer)
    turned = swapped.directions(x.flip(1))
    torch.testing.assert_close(turned[0].flip(1), back)
    torch.testing.assert_close(turned[1].flip(1), ahead)
    assert not torch.allclose(both(torch.cat([x[:, :-1], x[:, -1:] + 1], 1)).output[:, 0], whole[:, 0])


def test_bidirectional_equals_torch_s():
    both, x = Bidirectional(make("lstm"), mixers.build("lstm", DIM).double(), join="sum"), tokens()
    layer = nn.LSTM(DIM, DIM, batch_first=True, bidirectional=True).double()
    weights = {}
    for suffix, mixer in (("", both.forward_mixer), ("_reverse", both.backward_mixer)):
        weights |= {f"{key}{suffix}": value for key, value in mixer.cell.layer.state_dict().items()}
    layer.load_state_dict(weights)
    expected = torch.stack(layer(x)[0].chunk(2, -1)).sum(0)
    torch.testing.assert_close(both(x).output, expected)


def test_what_two_directions_cannot_do_is_refused():
    both = Bidirectional(make("gru"), mixers.build("gru", DIM).double())
    with pytest.raises(ValueError, match="causal"):
        both(tokens(), use_state=True)
    with pytest.raises(ValueError, match="causal self-mixers"):
        Bidirectional(make("softmax", causal=False), make("gru"))
    with pytest.raises(ValueError, match="two mixers"):
        Bidirectional(both.forward_mixer, both.forward_mixer)
    with pytest.raises(ValueError, match="join"):
        Bidirectional(make("gru"), mixers.build("gru", DIM), join="product")


def test_a_reservoir_has_its_spectral_radius_and_remembers():
    torch.manual_seed(0)
    net = mixers.build("echo_state", 1, hidden_size=60, spectral_radius=0.9)
    weight = net.cell.recurrent_weight
    assert abs(float(torch.linalg.eigvals(weight).abs().max()) - 0.9) < 1e-4
    assert 0.05 < float((weight != 0).double().mean()) < 0.15
    assert not any(name.startswith("cell") for name, _ in net.named_parameters())
    # Jaeger's memory capacity: sum over lags of the squared correlation of what is read with what came in
    # of small white noise, which the units carry on nearly unchanged
    net = net.double()
    x = 0.1 * (torch.rand(1, 3000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5)
    capacity = 0.0
    for lag in range(1, 61):
        net.fit(x[:, :2000], x[:, :2000].roll(lag, 1), washout=200, ridge=1e-9)
        read = net(x).output[0, 2000 + lag :, 0].detach()
        capacity += float(torch.corrcoef(torch.stack([read, x[0, 2000 : 3000 - lag, 0]]))[0, 1] ** 2)
    assert 0.3 * 60 < capacity <= 60


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lstm", {"hidden_size": 0}, "hidden_size"),
        ("elman", {"activation": "tanhh"}, "did you mean 'tanh'"),
        ("elman", {"recurrent_init": "zero"}, "recurrent_init"),
        ("jordan", {"self_link": 1.0}, "self_link"),
        ("jordan", {"activation": "gelu"}, "activation"),
        ("echo_state", {"spectral_radius": 0.0}, "spectral_radius"),
        ("echo_state", {"leak": 0.0}, "leak"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build(name, DIM, **options)


def test_fitting_refuses_what_it_cannot_fit():
    net, x = mixers.build("echo_state", 2), torch.zeros(1, 20, 2)
    with pytest.raises(ValueError, match="washout"):
        net.fit(x, x, washout=20)
    with pytest.raises(ValueError, match="ridge"):
        net.fit(x, x, ridge=0.0, washout=1)
    with pytest.raises(ValueError, match="must both be"):
        net.fit(x, x[:, :5])
