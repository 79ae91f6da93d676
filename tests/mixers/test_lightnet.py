"""LightNet: its layer written out, grids of any number of dimensions in one pass, and its two position encodings."""

import pytest
import torch
import torch.nn.functional as F

from subquad import mixers
from subquad.positions.lrpe import LRPE
from subquad.positions.md_lrpe import MDLRPE, MDTPE, grid_coordinates
from tests.mixers.cases import make, tokens


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_layer_written_out(causal):
    mixer, x = make("lightnet", causal=causal), tokens()
    q, k, v = (p(x).unflatten(-1, (4, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    visible = torch.ones(23, 23, dtype=torch.bool).tril() if causal else torch.ones(23, 23, dtype=torch.bool)
    weights = k[:, None].masked_fill(~visible[None, :, :, None, None], -torch.inf).softmax(2)
    o = torch.einsum("bihk,bijhk,bjhv->bihv", F.silu(q), weights, v).flatten(-2)
    expected = mixer.o_proj(F.rms_norm(o, (32,), mixer.o_norm.weight, 1e-5) * F.silu(mixer.g_proj(x)))
    torch.testing.assert_close(mixer(x).output, expected)


def test_cross_attention_to_itself_is_the_non_causal_layer():
    full, cross, x = make("lightnet", causal=False), make("lightnet"), tokens()
    torch.testing.assert_close(cross(x, x).output, full(x).output)


@pytest.mark.parametrize("options", [{"lrpe_dims": 1}, {"conv_size": 3}, {"initial_mass": 1}, {"expand_ratio": 5}])
def test_options_keep_the_contract_of_states_and_padding(options):
    mixer, x = make("lightnet", **options), tokens()
    whole = mixer(x, use_state=True)
    state, outputs = None, []
    for piece in x.split([1, 7, 1, 14], 1):
        result = mixer(piece, state=state, use_state=True)
        state = result.state
        outputs.append(result.output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, :6] = False
    torch.testing.assert_close(mixer(x, mask=mask).output[0, 6:], mixer(x[:1, 6:]).output[0])
    packed = mixer(x[:1], cu_seqlens=torch.tensor([0, 9, 23])).output
    torch.testing.assert_close(packed[:, 9:], mixer(x[:1, 9:]).output)


def test_positions_in_one_dimension_do_not_count_padding():
    mixer, x = make("lightnet", causal=False, lrpe_dims=1), tokens()
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, :5] = False
    torch.testing.assert_close(mixer(x, mask=mask).output[1:, 5:], mixer(x[1:, 5:]).output)


def test_a_grid_gives_the_positions_and_extra_tokens_stand_before_it():
    mixer, x = make("lightnet", causal=False, lrpe_dims=2), tokens(time=13)
    wide, tall = (mixer(x[:, :12], grid=grid).output for grid in ((3, 4), (4, 3)))
    assert not torch.allclose(wide, tall)
    order = torch.tensor([4, 0, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    assert not torch.allclose(mixer(x[:, order], grid=(3, 4)).output, wide[:, order])
    with_class_token = mixer(x, grid=(3, 4)).output
    assert with_class_token.shape == x.shape
    assert not torch.allclose(with_class_token[:, 1:], mixer(x[:, 1:], grid=(3, 4)).output)
    for grid in (None, (12,), (4, 4)):
        with pytest.raises(ValueError, match="grid"):
            mixer(x[:, :12], grid=grid)


def test_without_positions_the_order_of_tokens_moves_outputs_along():
    mixer, x = make("lightnet", causal=False), tokens()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x[:, order]).output, mixer(x).output[:, order])


def test_larger_pictures_need_no_new_parameters():
    mixer = make("lightnet", causal=False, lrpe_dims=2)
    for grid in ((14, 14), (24, 24)):
        assert mixer(tokens(batch=1, time=grid[0] * grid[1]), grid=grid).output.shape[1] == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrpe_dims": 2}, "one order"),
        ({"causal": False, "conv_size": 3}, "causal"),
        ({"causal": False, "initial_mass": 1}, "initial_mass"),
        ({"expand_ratio": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build("lightnet", 32, num_heads=4, **options)
    with pytest.raises(ValueError, match="one order"):
        make("lightnet")(tokens(time=12), grid=(3, 4))
    with pytest.raises(ValueError, match="lrpe_dims=0"):
        make("lightnet", lrpe_dims=1)(tokens(), tokens())


def test_md_lrpe_scores_depend_on_differences_of_coordinates_only():
    turn = MDLRPE(2, 5, dims=2).double()  # five channels, three frequencies: the second axis is cut to two
    assert turn.theta.shape == (2, 3)
    turn.theta.data.copy_(torch.linspace(0.1, 2, 6).view(2, 3))
    q, k = torch.randn(2, 1, 12, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = grid_coordinates((3, 4))
    scores = [torch.einsum("bihk,bjhk->bhij", turn(q, p), turn(k, p)) for p in (places, places + 50)]
    torch.testing.assert_close(scores[0], scores[1])
    moved = places + torch.tensor([1, 0])
    assert not torch.allclose(torch.einsum("bihk,bjhk->bhij", turn(q, moved), turn(k, places)), scores[0])
    distance = torch.cat([turn.theta[0] * (places[5] - places[0])[0], turn.theta[0] * (places[5] - places[0])[1]])[:5]
    expected = (q[0, 5, 0] * k[0, 0, 0] * distance.cos()).sum()
    torch.testing.assert_close(scores[0][0, 0, 5, 0], expected)


def test_md_lrpe_in_one_dimension_is_lrpe_and_leaves_extra_tokens_alone():
    many, one = MDLRPE(2, 4, dims=1), LRPE(2, 4)
    x = torch.randn(2, 6, 2, 4)
    torch.testing.assert_close(many(x, torch.arange(6)[:, None]), one(x, torch.arange(6).expand(2, -1)))
    turned = MDLRPE(2, 4, dims=2)(x, grid_coordinates((2, 2), extra=2))
    torch.testing.assert_close(turned[:, :2, :, :4], x[:, :2])
    assert bool((turned[:, :2, :, 4:] == 0).all())
    with pytest.raises(ValueError, match="coordinates must be"):
        many(x, grid_coordinates((2, 3)))
    with pytest.raises(ValueError, match="dims must lie"):
        MDLRPE(2, 4, dims=5)
    with pytest.raises(ValueError, match="sizes >= 1"):
        grid_coordinates((2, 0))


def test_md_tpe_sums_along_each_axis_with_decay():
    layer, x = MDTPE(8, 2, dims=2).double(), tokens(time=6)[..., :8]
    picture = x.view(2, 2, 3, 8)
    expected = torch.zeros_like(picture)
    for axis, projection in enumerate(layer.projections):
        decay = torch.sigmoid(layer.decay_logit[axis]).repeat_interleave(4)
        factor = (layer.query[axis] * layer.key[axis]).view(2, 4).sum(-1).repeat_interleave(4)
        total, sums = torch.zeros_like(picture.select(1 + axis, 0)), []
        for part in picture.unbind(1 + axis):
            total = decay * total + part
            sums.append(factor * total)
        expected = expected + projection(F.rms_norm(torch.stack(sums, 1 + axis), (8,), eps=1e-6))
    torch.testing.assert_close(layer(x, (2, 3)), expected.flatten(1, 2))
    with pytest.raises(ValueError, match="product is the number of tokens"):
        layer(x, (2, 2))


def test_md_tpe_along_an_axis_of_length_one_is_linear_up_to_its_norm():
    layer = MDTPE(8, 2, dims=1).double()
    layer.norms[0] = torch.nn.Identity()
    x, y = torch.randn(2, 3, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(layer(2 * x - 3 * y, (1,)), 2 * layer(x, (1,)) - 3 * layer(y, (1,)))
