"""Aaren is softmax attention whose query is one learnt vector, with the paper's number of parameters."""

import pytest
import torch
from torch import nn

from subquad import mixers
from subquad.mixers.aaren import Aaren
from tests.mixers.cases import make, tokens


def trained(**options):
    """A layer whose query and scores are large enough to matter."""
    mixer = make("aaren", **options)
    with torch.no_grad():
        mixer.query_token.normal_(generator=torch.Generator().manual_seed(1)).mul_(4)
    return mixer


def test_equals_attention_with_one_query_written_out():
    mixer, x = trained(), tokens()
    q = mixer.q_proj(mixer.query_token).view(4, 8)
    k, v = (p(x).unflatten(-1, (4, 8)) for p in (mixer.k_proj, mixer.v_proj))
    scores = torch.einsum("hk,bjhk->bhj", q, k) / 8**0.5
    assert scores.std() > 0.5
    rows = scores[:, :, None].expand(-1, -1, 23, -1).masked_fill(~torch.ones(23, 23).bool().tril(), -torch.inf)
    o = torch.einsum("bhij,bjhv->bihv", rows.softmax(-1), v)
    torch.testing.assert_close(mixer(x).output, mixer.o_proj(o.flatten(-2)))


def test_equals_torch_s_attention_with_the_query_token_over_every_prefix():
    mixer, x = trained(), tokens().requires_grad_()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    parts = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(mixer.o_proj.state_dict())
    query = mixer.query_token.expand(2, 1, -1)
    prefixes = [theirs(query, x[:, :t], x[:, :t], need_weights=False)[0] for t in range(1, 24)]
    expected, found = torch.cat(prefixes, 1), mixer(x).output
    torch.testing.assert_close(found, expected)
    wanted = [x, mixer.query_token]
    gradients = [torch.autograd.grad(y.sin().sum(), wanted) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_pooling_is_the_last_output_and_leaves_padding_out():
    mixer, x = trained(), tokens()
    torch.testing.assert_close(mixer.pool(x), mixer(x).output[:, -1])
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 9:] = mask[1, :5] = False
    pooled = mixer.pool(x, mask)
    torch.testing.assert_close(pooled[0], mixer.pool(x[:1, :9])[0])
    torch.testing.assert_close(pooled[1], mixer.pool(x[1:, 5:])[0])
    mask[0] = False
    torch.testing.assert_close(mixer.pool(x, mask)[0], mixer.o_proj.bias)
    with pytest.raises(TypeError, match="mask must be bool"):
        mixer.pool(x, mask.float())


def test_parameters_are_a_transformer_layer_s_and_one_token():
    layer = nn.TransformerEncoderLayer(512, 8, 2048)
    count = sum(p.numel() for p in layer.parameters())
    attention = sum(p.numel() for p in layer.self_attn.parameters())
    aaren = sum(p.numel() for p in Aaren(512, 8).parameters())
    assert count == 3_152_384
    assert count - attention + aaren == 3_152_896


def test_the_state_is_h_times_v_plus_two_numbers_at_any_length():
    mixer = make("aaren", torch.float32)
    for time in (1, 300):
        state = mixer(tokens(time=time, dtype=torch.float32), use_state=True).state
        assert sum(leaf[0].numel() for leaf in state) == 4 * (8 + 2)
        assert all(leaf.dtype == torch.float32 for leaf in state)


def test_an_adapted_key_projection_is_read_as_it_computes():
    """The short way to the scores multiplies weights; a wrapped projection (LoRA) is called instead."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 0.5 * x

    mixer, x = trained(), tokens()
    plain = mixer(x).output
    merged = trained()
    merged.k_proj.weight.data += 0.5 * torch.eye(32)
    mixer.k_proj = Adapted(mixer.k_proj)
    torch.testing.assert_close(mixer(x).output, merged(x).output)
    assert not torch.allclose(mixer(x).output, plain)


def test_the_bias_of_keys_cancels():
    mixer, x = trained(), tokens()
    before = mixer(x).output
    mixer.k_proj.bias.data += 3.0
    torch.testing.assert_close(mixer(x).output, before)
    assert mixers.build("aaren", 32, num_heads=4, bias=False).k_proj.bias is None


@pytest.mark.parametrize("options", [{"context": tokens(time=4)}, {"prefix_lengths": torch.tensor([3, 4])}])
def test_uses_that_one_fixed_query_cannot_serve_are_refused(options):
    with pytest.raises(ValueError, match="it serves causal self-attention"):
        make("aaren")(tokens(), **options)
