"""What every mixer must do, for every name in the catalog: splits, masks, packing, states, refusals."""

from itertools import pairwise

import pytest
import torch

from subquad import mixers
from subquad.mixers.contract import Pattern, named_leaves
from tests.mixers.cases import CAUSAL, DIM, NAMES, make, tokens, wide_state

names = pytest.mark.parametrize("name", NAMES)
causal_names = pytest.mark.parametrize("name", CAUSAL)
PATTERNS = {name: mixers.mixer_class(name).patterns for name in NAMES}
full = pytest.mark.parametrize("name", [n for n in NAMES if Pattern.FULL_SELF in PATTERNS[n]])
cross = pytest.mark.parametrize("name", [n for n in NAMES if Pattern.FULL_CROSS in PATTERNS[n]])


@causal_names
def test_prefill_and_steps_equal_one_forward_at_every_split(name):
    mixer, x = make(name), tokens()
    whole = mixer(x, use_state=True)
    state, outputs = wide_state(mixer, 2), []
    states = [state]
    for t in range(x.shape[1]):
        step = mixer(x[:, t : t + 1], state=states[-1], use_state=True)
        outputs.append(step.output)
        states.append(step.state)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output)
    for cut in range(1, x.shape[1]):
        head = mixer(x[:, :cut], state=state, use_state=True)
        tail = mixer(x[:, cut:], state=head.state, use_state=True)
        torch.testing.assert_close(torch.cat([head.output, tail.output], 1), whole.output)
        rest = mixer(x[:, cut:], state=states[cut], use_state=True)  # a state made by steps serves a prefill too
        torch.testing.assert_close(rest.output, whole.output[:, cut:])


@causal_names
@pytest.mark.parametrize("seed", range(3))
def test_padding_anywhere_changes_neither_output_nor_state(name, seed):
    mixer, x = make(name), tokens()
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, seed] = True
    spoiled = x.clone()
    spoiled[~mask] = 1e3  # whatever stands in the padding
    padded = mixer(spoiled, mask=mask, use_state=True)
    assert bool((padded.output[~mask] == 0).all())
    following = mixer(tokens(time=4, seed=9), state=padded.state, use_state=True).output
    for row in range(2):
        alone = mixer(x[row : row + 1, mask[row]], use_state=True)
        torch.testing.assert_close(padded.output[row, mask[row]], alone.output[0])
        after = mixer(tokens(time=4, seed=9)[row : row + 1], state=alone.state, use_state=True).output
        torch.testing.assert_close(following[row], after[0])


@names
def test_packed_equals_separate(name):
    mixer, x = make(name), tokens(batch=1)
    offsets = [0, 1, 1, 9, 23]
    packed = mixer(x, cu_seqlens=torch.tensor(offsets)).output
    for a, b in pairwise(offsets):
        if b > a:
            torch.testing.assert_close(packed[:, a:b], mixer(x[:, a:b]).output)


@causal_names
def test_output_depends_on_no_later_token(name):
    mixer, x = make(name), tokens()
    changed = x.clone()
    changed[:, 12:] += 1
    torch.testing.assert_close(mixer(changed).output[:, :12], mixer(x).output[:, :12], rtol=0, atol=1e-12)
    assert not torch.allclose(mixer(changed).output[:, 12:], mixer(x).output[:, 12:])


@causal_names
def test_state_leaves_have_the_batch_first_so_beams_reorder(name):
    mixer, x = make(name), tokens()
    state = mixer(x[:, :11], use_state=True).state
    swapped = type(state)(*[_swap(leaf) for leaf in state])
    direct = mixer(x[:, 11:], state=state, use_state=True).output
    reordered = mixer(x[:, 11:].flip(0), state=swapped, use_state=True).output
    torch.testing.assert_close(reordered.flip(0), direct)


def _swap(leaf):
    if leaf is None:
        return None
    return leaf.flip(0) if isinstance(leaf, torch.Tensor) else type(leaf)(*[_swap(x) for x in leaf])


@causal_names
def test_constant_states_stay_constant(name):
    mixer = make(name)

    def size(time):
        state = mixer(tokens(time=time), use_state=True).state
        return sum(leaf.numel() for _, leaf in named_leaves(state))

    assert (size(40) == size(80)) == mixer.constant_state


@names
def test_bfloat16_stays_near_float64(name):
    exact, x = make(name), tokens(dtype=torch.bfloat16)
    rounded = make(name, torch.bfloat16)
    exact.load_state_dict({k: v.double() for k, v in rounded.state_dict().items()})
    output = rounded(x).output
    assert output.dtype == torch.bfloat16
    expected = exact(x.double()).output
    # a layer is some eight roundings deep (projections, gate, op, norm, output): 8 x 2^-8 of the largest value
    assert (output.double() - expected).abs().max() <= 8 * 2**-8 * expected.abs().max()


@names
def test_every_parameter_gets_a_gradient(name):
    mixer = make(name)
    # a prefix may have weights of its own
    prefix = torch.tensor([7, 0]) if Pattern.PREFIX_SELF in mixer.patterns else None
    mixer(tokens(), prefix_lengths=prefix).output.cos().sum().backward()
    without = [n for n, p in mixer.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


@full
def test_non_causal_sees_all_tokens_and_no_padding(name):
    mixer, x = (
        make(name, causal=False, **({"window_size": None, "num_sinks": 0} if name == "sliding_window" else {})),
        tokens(),
    )
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, 15:] = False
    output = mixer(x, mask=mask).output
    torch.testing.assert_close(output[1:, :15], mixer(x[1:, :15]).output)
    assert bool((output[1, 15:] == 0).all())
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(mixer(changed).output[0, 18:-1], mixer(x).output[0, 18:-1])
    packed = mixer(x[:1], cu_seqlens=torch.tensor([0, 7, 23])).output
    torch.testing.assert_close(packed[:, :7], mixer(x[:1, :7]).output)
    with pytest.raises(ValueError, match="causal"):
        mixer(x, use_state=True)


@cross
@pytest.mark.parametrize("causal", [True, False])
def test_cross_reads_the_whole_context_and_no_padding(name, causal):
    alone = Pattern.CAUSAL_CROSS in PATTERNS[name]  # each output depends on its own query, whether causal or not
    if causal and not alone:
        pytest.skip("not served")
    options = {"window_size": None, "num_sinks": 0} if name == "sliding_window" else {}
    mixer, x, context = make(name, causal=causal, **options), tokens(time=6), tokens(time=14, seed=1)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 10:] = False
    output = mixer(x, context, mask=mask).output
    torch.testing.assert_close(output[:1], mixer(x[:1], context[:1, :10]).output)
    if alone:
        torch.testing.assert_close(mixer(x[:, :3], context, mask=mask).output, output[:, :3])


@names
def test_uses_outside_the_patterns_are_refused_by_name(name):
    mixer, x = make(name), tokens()
    if (Pattern.CAUSAL_CROSS if mixer.causal else Pattern.FULL_CROSS) not in mixer.patterns:
        with pytest.raises(ValueError, match="it serves"):
            mixer(x, x)
    if Pattern.PREFIX_SELF not in mixer.patterns:
        with pytest.raises(ValueError, match="prefix-causal"):
            mixer(x, prefix_lengths=torch.tensor([3, 4]))
    if not mixer.patterns & {Pattern.FULL_SELF, Pattern.FULL_CROSS}:
        with pytest.raises(ValueError, match="causal=False"):
            make(name, causal=False)
    if not mixer.patterns & {Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS, Pattern.PREFIX_SELF}:
        with pytest.raises(ValueError, match="causal=True serves no use; it serves non-causal"):
            make(name, causal=True)
    if not mixer.uses_positions:
        with pytest.raises(ValueError, match="uses no positions"):
            mixer(x, positions=torch.zeros(2, 23, dtype=torch.int64))


@names
def test_bad_input_gets_a_sentence(name):
    mixer, x = make(name), tokens()
    with pytest.raises(ValueError, match=r"x must be \(batch, time, 32\)"):
        mixer(x[..., :5])
    with pytest.raises(ValueError, match="nothing empty"):
        mixer(x[:, :0])
    with pytest.raises(TypeError, match="mask must be bool"):
        mixer(x, mask=torch.ones(2, 23))
    with pytest.raises(ValueError, match="mask must be"):
        mixer(x, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="not both"):
        mixer(x[:1], mask=torch.ones(1, 23, dtype=torch.bool), cu_seqlens=torch.tensor([0, 23]))
    if mixer.causal:
        with pytest.raises(ValueError, match="rows"):
            mixer(x, state=mixer.init_state(3, torch.float64, "cpu"))
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        mixers.build(name, DIM, num_heads=5)
    with pytest.raises(ValueError, match="layer_index"):
        make(name, layer_index=2, num_layers=2)


def test_wrong_names_and_options_get_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'delta_net'"):
        mixers.build("deltanet", DIM)
    with pytest.raises(ValueError, match=r"'expand_q'; did you mean .*'expand_k'"):
        mixers.build("gla", DIM, expand_q=1)
