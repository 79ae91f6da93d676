"""Linear attention from logarithms of features: equal to the plain form wherever that does not overflow."""

import pytest
import torch

from subquad.ops import ExponentialState, exponential_linear_attention, linear_attention


def draw(time=41, batch=2, size=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(width, factor):
        return factor * torch.randn(batch, time, 3, width, generator=generator, dtype=torch.float64)

    return tensor(5, size), tensor(5, size), tensor(4, 1.0)


def earlier(rows=2):
    """The state that seven tokens left."""
    log_q, log_k, v = draw(7, rows, seed=5)
    return exponential_linear_attention(log_q, log_k, v, return_state=True)[1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("continued", [True, False])
def test_equals_linear_attention_on_the_features(causal, packed, continued):
    log_q, log_k, v = (x.requires_grad_() for x in draw(batch=1 if packed else 2))
    cu_seqlens = torch.tensor([0, 3, 3, 20, 41]) if packed else None
    options = {"causal": causal, "cu_seqlens": cu_seqlens, "return_state": True}
    state = earlier(4 if packed else 2) if continued else None
    results = []
    for backend in ("reference", "chunked"):
        output, last = exponential_linear_attention(
            log_q, log_k, v, eps=0.0, backend=backend, initial_state=state, **options
        )
        factor = last.log_scale.exp()
        gradients = torch.autograd.grad(output.cos().sum(), (log_q, log_k, v))
        results.append([output, last.state * factor[..., None, None], last.normalizer * factor[..., None], *gradients])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a)
    if not continued:
        plain, last = linear_attention(log_q.exp(), log_k.exp(), v, normalize=True, eps=0.0, **options)
        for a, b in zip((plain, *last), results[1]):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("causal", [True, False])
def test_logarithms_of_sixty_are_exact_and_of_five_hundred_are_finite(causal):
    """Hedgehog's logarithms [y, -y]. exp(60)^2 is no float32; rounding y at 60 by 2^-19 shows in a weight as 2e-6."""
    log_q, log_k, v = (x.float() for x in draw(300, size=20.0))
    log_q, log_k = (torch.cat([y, -y], dim=-1) for y in (log_q.clamp(-60, 60), log_k.clamp(-60, 60)))
    expected, _ = exponential_linear_attention(
        log_q.double(), log_k.double(), v.double(), causal=causal, backend="reference"
    )
    actual, _ = exponential_linear_attention(log_q, log_k, v, causal=causal)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    far, _ = exponential_linear_attention(log_q * 8, log_k * 8, v, causal=causal)
    assert far.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_pieces(causal):
    log_q, log_k, v = draw()
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[0, 30:] = False
    padded, last = exponential_linear_attention(log_q, log_k, v, causal=causal, mask=mask, return_state=True)
    alone, end = exponential_linear_attention(
        log_q[:1, :30], log_k[:1, :30], v[:1, :30], causal=causal, return_state=True
    )
    torch.testing.assert_close(padded[:1, :30], alone)
    torch.testing.assert_close([x[:1] for x in last], list(end))


def test_split_equals_whole():
    log_q, log_k, v = draw()
    whole, last = exponential_linear_attention(log_q, log_k, v, return_state=True)
    head, state = exponential_linear_attention(log_q[:, :17], log_k[:, :17], v[:, :17], return_state=True)
    tail, end = exponential_linear_attention(
        log_q[:, 17:], log_k[:, 17:], v[:, 17:], initial_state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([head, tail], 1), whole)
    torch.testing.assert_close(end, last)


def test_cpu_backend_and_gradcheck():
    arguments = [x.float() for x in draw()]
    expected, _ = exponential_linear_attention(*(x.double() for x in arguments), backend="reference")
    actual, _ = exponential_linear_attention(*arguments, backend="cpu")
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    small = [x[:1, :6].requires_grad_() for x in draw(size=1.0)]
    assert torch.autograd.gradcheck(lambda *x: exponential_linear_attention(*x, eps=0.0, chunk_size=4)[0], small)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"initial_state": (torch.zeros(1), torch.zeros(1))}, TypeError, "ExponentialState"),
        ({"initial_state": ExponentialState(*torch.zeros(3, 1))}, ValueError, r"initial_state\.state must"),
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
    ],
)
def test_bad_options_get_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        exponential_linear_attention(*draw(), **options)
