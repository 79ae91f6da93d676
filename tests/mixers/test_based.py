"""What is particular to Based: the two mixers written out, its window, and the whole hybrid with its state."""

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM, mixers
from subquad.mixers.base_conv import BaseConv
from tests.mixers.cases import make, tokens


def test_taylor_layer_written_out():
    mixer, x = make("taylor_linear", feature_dim=5), tokens()
    q, k = (p(x).unflatten(-1, (4, 5)) for p in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x).unflatten(-1, (4, 8))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * 5**-0.5
    weights = (1 + score + score.square() / 2).tril()
    o = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(mixer(x).output, mixer.o_proj(o.flatten(-2)))


def test_base_conv_written_out():
    mixer, x = make("base_conv"), tokens()
    assert isinstance(mixer, BaseConv)
    a, b = mixer.i_proj(x).chunk(2, -1)
    assert a.shape[-1] == 64
    taps = mixer.convolution.weight
    before = torch.nn.functional.pad(a, (0, 0, 2, 0))
    mixed = sum(before[:, tap : tap + 23] * taps[:, tap] for tap in range(3))
    torch.testing.assert_close(mixer(x).output, mixer.o_proj(torch.nn.functional.silu(mixed) * b))
    with pytest.raises(ValueError, match="expand"):
        make("base_conv", expand=1)


def test_the_order_of_the_past_is_invisible_to_the_linear_layer():
    mixer, x = make("taylor_linear"), tokens()
    shuffled = torch.cat([x[:, :15].flip(1), x[:, 15:]], 1)
    torch.testing.assert_close(mixer(shuffled).output[:, 15:], mixer(x).output[:, 15:])


def test_a_window_sees_so_many_keys_and_the_whole_past_if_it_is_as_long():
    options = {"num_sinks": 0, "rope_base": None}
    mixer, x = make("sliding_window", window_size=7, **options), tokens()
    changed = x.clone()
    changed[:, 10] += 1
    difference = (mixer(changed).output - mixer(x).output).abs().sum(-1)[0] > 0
    assert difference.nonzero().flatten().tolist() == list(range(10, 17))
    wide, softmax = make("sliding_window", window_size=23, **options), make("softmax", rope_base=None)
    softmax.load_state_dict(wide.state_dict())
    torch.testing.assert_close(wide(x).output, softmax(x).output)
    one = make("sliding_window", window_size=1, **options)
    torch.testing.assert_close(one(x).output, one.o_proj(one.v_proj(x)))


def test_the_hybrid_steps_as_it_reads_and_its_state_has_the_size_of_the_formula():
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = SubquadForCausalLM(SubquadConfig.preset("based_360m", vocab_size=50, **fields)).eval()
    names = [type(mixer).__name__ for mixer in model.model.mixers()]
    assert names == ["BaseConv", "LinearAttention", "SoftmaxAttention", "BaseConv"]
    ids = torch.randint(50, (2, 140), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        cache, logits = None, []
        for piece in ids.split([130] + [1] * 10, 1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    heads, features, value, window = 4, 153, 16, 129
    expected = 2 * (2 * 2 * 64) + heads * features * (value + 1) + 2 * (window - 1) * 64
    held = cache.number_of_bytes() - 2 * (window - 1) * 8  # positions of the window
    assert held == 2 * 4 * expected


@pytest.mark.parametrize(
    ("preset", "linear", "window", "layers", "parameters"),
    [
        ("based_360m", (1, 6, 11, 16, 21), (2, 7, 12, 17, 22), 27, 360e6),
        ("based_1b", (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34), 36, 1.3e9),
    ],
)
def test_presets_have_their_layers_and_size(preset, linear, window, layers, parameters):
    config = SubquadConfig.preset(preset)
    assert len(config.mixers) == layers
    for layer, entry in enumerate(config.mixers):
        name = entry if isinstance(entry, str) else entry["name"]
        wanted = "taylor_linear" if layer in linear else "sliding_window" if layer in window else "base_conv"
        assert name == wanted
    with torch.device("meta"):
        model = SubquadForCausalLM(config)
    assert {m.rope_base for m in model.model.mixers() if hasattr(m, "rope_base")} == {None}
    assert abs(sum(p.numel() for p in model.parameters()) / parameters - 1) < 0.06


def test_a_wide_head_cannot_be_mapped_by_accident():
    with pytest.raises(ValueError, match="set feature_dim"):
        mixers.build("linear", 64, num_heads=1, feature_map="taylor")
