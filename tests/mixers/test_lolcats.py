"""What is particular to LoLCATs: its features, its window, and maps that a group of heads shares."""

import pytest
import torch

from subquad.mixers.cores import Heads
from subquad.mixers.lolcats import LolcatsCore
from subquad.ops import linear_attention, sliding_linear_attention, softmax_attention
from tests.mixers.cases import make, tokens
from tests.mixers.test_liger import heads


def test_features_are_two_softmaxes_of_a_cut_identity():
    core = LolcatsCore(4, 2, 8, feature_dim=5).double()
    x = heads().q
    expected = torch.cat([x[..., :5].softmax(-1), (-x[..., :5]).softmax(-1)], -1)
    torch.testing.assert_close(core.phi.query(x), expected)
    torch.testing.assert_close(core.gamma.sigmoid(), torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0)
    assert {name: tuple(p.shape) for name, p in core.named_parameters()} == {
        "gamma": (4,),
        "phi.q_map.weight": (4, 5, 8),
        "phi.k_map.weight": (4, 5, 8),
    }


def test_it_attends_with_positions_and_weighs_as_its_options_say():
    h = heads()
    core = LolcatsCore(4, 2, 8, window=5).double()
    phi_q, phi_k = core.phi.query(h.q_turned), core.phi.key(h.k_turned.repeat_interleave(2, 2))
    arguments = (h.q_turned, h.k_turned, h.v, phi_q, phi_k, core.gamma.sigmoid())
    torch.testing.assert_close(core(h)[0], sliding_linear_attention(*arguments, window=5, scale=0.3)[0])
    affine = LolcatsCore(4, 2, 8, window=5, affine=True).double()
    arguments = (h.q_turned, h.k_turned, h.v, 0.9 * phi_q, phi_k, core.gamma.sigmoid())
    torch.testing.assert_close(
        affine(h)[0], sliding_linear_attention(*arguments, window=5, scale=0.3)[0], rtol=1e-6, atol=1e-6
    )
    wide = LolcatsCore(4, 2, 8, window=64).double()
    torch.testing.assert_close(wide(h)[0], softmax_attention(h.q_turned, h.k_turned, h.v, scale=0.3)[0])
    alone = LolcatsCore(4, 2, 8, window=None).double()
    linear = linear_attention(phi_q, phi_k, h.v.repeat_interleave(2, 2), normalize=True)[0]
    torch.testing.assert_close(alone(h)[0], linear)
    assert [name for name, _ in alone.named_parameters()] == ["phi.q_map.weight", "phi.k_map.weight"]


def test_shared_maps_keep_one_state_for_a_group():
    h = heads()
    for window in (5, None):
        core = LolcatsCore(4, 2, 8, window=window, feature_dim=8, share_kv_maps=True).double()
        repeated = LolcatsCore(4, 2, 8, window=window, feature_dim=8).double()
        with torch.no_grad():
            core.phi.k_map.weight.normal_()
            repeated.phi.k_map.weight.copy_(core.phi.k_map.weight.repeat_interleave(2, 0))
        torch.testing.assert_close(core(h)[0], repeated(h)[0])
        if window:
            assert core(h, use_state=True)[1].state.shape == (2, 2, 16, 8)


@pytest.mark.parametrize("form", ["sliding", "terraced"])
def test_padded_rows_equal_single_ones(form):
    core = LolcatsCore(4, 2, 8, window=4, form=form).double()
    h = heads()
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, :6] = False
    output, state = core(h, mask=mask, use_state=True)
    alone, own = core(h.map(lambda x: x[1:, 6:]), use_state=True)
    torch.testing.assert_close(output[1:, 6:], alone)
    assert not output[1, :6].any()
    for a, b in zip(state, own):
        torch.testing.assert_close(a[1:], b)
    nothing, kept = core(h, mask=torch.zeros_like(mask), use_state=True)
    assert not nothing.any()
    assert int(kept.seen.sum()) == 0


def test_sliding_and_terraced_are_other_mixers():
    x = tokens()
    assert not torch.allclose(make("lolcats")(x).output, make("lolcats", form="sliding")(x).output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "tarraced"}, "terraced"),
        ({"feature_map": "hedgehog"}, "hedgehog"),
        ({"window": 0}, "window must be an integer >= 1"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"window": None, "affine": True}, "needs a window"),
    ],
)
def test_wrong_options_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make("lolcats", **options)


def test_new_parameters_stay_float32_in_a_bfloat16_layer():
    core = LolcatsCore(4, 2, 8, window=4)
    low = Heads(*(x.bfloat16() for x in heads()[:5]), 0.3)
    assert core(low)[0].dtype == torch.bfloat16
