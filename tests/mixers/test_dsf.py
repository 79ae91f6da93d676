"""What is particular to the mixers of the dynamical systems framework (Sieber et al. 2024)."""

import pytest
import torch

from tests.mixers.cases import make, tokens


def heads(x, count=4):
    return x.unflatten(-1, (count, -1)).double()


def test_normalised_attention_divides_by_a_function_of_the_token():
    mixer, x = make("normalized_attention"), tokens()
    with torch.no_grad():
        mixer.normalizer_weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        mixer.normalizer_bias.normal_(generator=torch.Generator().manual_seed(2))
    q, k, v = (heads(projection(x)) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    divisor = (x @ mixer.normalizer_weight.mT + mixer.normalizer_bias).exp()
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril() / divisor.transpose(1, 2)[..., None]
    expected = mixer.o_proj(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x).output, expected)


@pytest.mark.parametrize("normalizer", ["softplus", "sigmoid"])
def test_other_normalisers_are_what_they_are_called(normalizer):
    plain, mixer, x = make("normalized_attention"), make("normalized_attention", normalizer=normalizer), tokens()
    mixer.load_state_dict(plain.state_dict())
    value = getattr(torch.nn.functional, normalizer)(torch.zeros((), dtype=torch.float64))
    with torch.no_grad():
        mixer.o_proj.bias.zero_()
        plain.o_proj.bias.zero_()
    torch.testing.assert_close(mixer(x).output * value, plain(x).output)


def test_normalised_attention_starts_undivided_and_refuses_unknown_normalisers():
    mixer = make("normalized_attention")
    assert not bool(mixer.normalizer_weight.any() or mixer.normalizer_bias.any())
    with pytest.raises(ValueError, match="did you mean 'exp'"):
        make("normalized_attention", normalizer="expo")


@pytest.mark.parametrize("reversed_sigmoid", [False, True])
def test_a_quasi_lstm_token_by_token(reversed_sigmoid):
    mixer, x = make("qlstm", reversed_sigmoid=reversed_sigmoid), tokens()
    if reversed_sigmoid:
        with torch.no_grad():
            mixer.exponent.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    gate, inner = mixer.in_proj(x).chunk(2, -1)
    inner = mixer.convolution(inner)[0]
    forget, write, read = mixer.gates(inner).chunk(3, -1)
    cell, outputs = torch.zeros_like(inner[:, 0]), []
    for t in range(x.shape[1]):
        decay = torch.sigmoid(-forget[:, t]) ** mixer.exponent if reversed_sigmoid else torch.sigmoid(forget[:, t])
        cell = decay * cell + torch.sigmoid(write[:, t]) * inner[:, t]
        outputs.append(torch.nn.functional.gelu(gate[:, t]) * torch.sigmoid(read[:, t]) * cell)
    torch.testing.assert_close(mixer(x).output, mixer.out_proj(torch.stack(outputs, 1)))
