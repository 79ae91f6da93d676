"""MixtureOfMemories (``mom``) against loops over memories; what a router may and may not do; the balance loss."""

import pytest
import torch
import torch.nn.functional as F

from subquad import SubquadConfig, SubquadForCausalLM, mixers
from subquad.layers.norms import l2_normalize
from subquad.layers.short_convolution import ConvolutionTails
from subquad.mixers import mixture_of_memories
from subquad.mixers.contract import total_loss
from subquad.mixers.mixture_of_memories import INNERS, MixtureOfMemories, RouterLoad
from tests.mixers.cases import make, tokens

inners = pytest.mark.parametrize("inner", INNERS)


def chosen_by(mixer, x):
    """Memories ``(B, T, k)`` and their weights, of the shared memory too."""
    weights, chosen = mixer.probabilities(x).topk(mixer.top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    if mixer.all_memories > mixer.num_memories:
        chosen, weights = F.pad(chosen, (0, 1), value=mixer.num_memories), F.pad(weights, (0, 1), value=1.0)
    return chosen, weights


def one_memory(mixer, projections, x, silent=None):
    """What one memory reads from ``(B, T, D)``; where ``silent (B, T)`` nothing is written, erased or forgotten."""
    k, v, beta, gate = projections(x)
    q, k, v, _ = mixer.convolutions(mixer.q_proj(x), k, v)
    if not mixer.convolutions.width:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k = (y.unflatten(-1, (-1, mixer.head_k_dim)) for y in (q, k))
    if mixer.inner.erases:
        q, k = l2_normalize(q), l2_normalize(k)
    v = v.unflatten(-1, (-1, mixer.head_v_dim))
    gates = []
    if gate is not None:
        gates.append(mixer._log_decay(gate))
    if beta is not None:
        gates.append(torch.sigmoid(beta))
    if silent is not None:
        k, v, *gates = (y.masked_fill(silent.view(*silent.shape, *[1] * (y.ndim - 2)), 0) for y in (k, v, *gates))
    return mixer.inner.op(q, k, v, *gates, scale=mixer.head_k_dim**-0.5)[0]


def projections_of(mixer, memory):
    return mixer.memories[0] if len(mixer.memories) == 1 else mixer.memories[memory]


def finished(mixer, o, x):
    gate = F.silu(mixer.g_proj(x)).unflatten(-1, (-1, mixer.head_v_dim))
    return mixer.o_proj((mixer.o_norm(o) * gate).flatten(-2))


def by_loops(mixer, x):
    """The definition: for every row and memory, the tokens that chose it are a sequence of their own."""
    chosen, weights = chosen_by(mixer, x)
    o = x.new_zeros(*x.shape[:2], mixer.num_heads, mixer.head_v_dim)
    for row in range(x.shape[0]):
        for memory in range(mixer.all_memories):
            here, choice = (chosen[row] == memory).nonzero(as_tuple=True)
            if len(here):
                read = one_memory(mixer, projections_of(mixer, memory), x[row : row + 1, here])[0]
                o[row, here] += weights[row, here, choice][:, None, None] * read
    return finished(mixer, o, x)


def by_masks(mixer, x):
    """Every memory over all tokens, silent where it was not chosen: the same without convolutions."""
    chosen, weights = chosen_by(mixer, x)
    o = 0
    for memory in range(mixer.all_memories):
        weight = (weights * (chosen == memory)).sum(-1)
        silent = (chosen != memory).all(-1)
        o = o + weight[..., None, None] * one_memory(mixer, projections_of(mixer, memory), x, silent)
    return finished(mixer, o, x)


@inners
@pytest.mark.parametrize("options", [{}, {"shared": False}, {"single_kv": True}, {"top_k": 1}, {"top_k": 3}])
def test_equals_the_loop_over_memories(inner, options):
    mixer, x = make("mom", inner=inner, num_memories=3, **options), tokens(batch=3)
    torch.testing.assert_close(mixer(x).output, by_loops(mixer, x))


@inners
def test_without_convolutions_equals_silent_tokens(inner):
    mixer, x = make("mom", inner=inner, conv_size=0), tokens()
    torch.testing.assert_close(mixer(x).output, by_masks(mixer, x))


@pytest.mark.parametrize("largest_buffer", [2**24, 5 * 3 * 32 * 8])
def test_gradients_equal_those_of_the_loop(largest_buffer, monkeypatch):
    """Also where five tokens at a time are all that fits: the states go from piece to piece."""
    monkeypatch.setattr(mixture_of_memories, "LARGEST_BUFFER", largest_buffer)
    mixer, x = make("mom"), tokens().requires_grad_()
    gradients = []
    for function in (lambda: mixer(x).output, lambda: by_loops(mixer, x)):
        gradients.append(torch.autograd.grad(function().cos().sum(), [x, *mixer.parameters()]))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert gradients[0][1].shape == mixer.router.weight.shape
    assert bool(gradients[0][1].abs().sum() > 0)


def test_a_batch_equals_its_rows():
    mixer, x = make("mom"), tokens(batch=2)
    separate = torch.cat([mixer(row[None]).output for row in x])
    torch.testing.assert_close(mixer(x).output, separate)


def test_memories_may_change_places():
    mixer, other, x = make("mom", num_memories=4), make("mom", num_memories=4), tokens()
    order = [2, 0, 3, 1]
    weights = {
        name: value
        for name, value in mixer.state_dict().items()
        if not name.startswith("memories.") or name.startswith("memories.4")
    }
    weights["router.weight"] = mixer.router.weight[order]
    for new, old in enumerate(order):
        weights.update({f"memories.{new}.{n}": w for n, w in mixer.memories[old].state_dict().items()})
    other.load_state_dict(weights)
    torch.testing.assert_close(other(x).output, mixer(x).output)


def with_shared_weights(mixer):
    """The same projections in every memory."""
    for memory in mixer.memories[1:]:
        memory.load_state_dict(mixer.memories[0].state_dict())
    return mixer


def gated_delta_net(mixer):
    """The plain inner mixer with the weights of the first memory."""
    plain = mixers.build("gated_delta_net", 32, num_heads=4, expand_k=1.0, expand_v=1.0).double()
    own, first = mixer.state_dict(), mixer.memories[0]
    weights = {name: own[name] for name in plain.state_dict() if name in own}
    weights |= {"k_proj.weight": first.k_proj.weight, "v_proj.weight": first.v_proj.weight}
    weights |= {"b_proj.weight": first.b_proj.weight, "gate.proj.weight": first.a_proj.weight}
    weights |= {"gate.A_log": mixer.decay.A_log, "gate.dt_bias": mixer.decay.dt_bias}
    plain.load_state_dict(weights)
    return plain


def test_one_memory_is_the_inner_mixer():
    mixer, x = make("mom", num_memories=1, top_k=1, shared=False), tokens()
    assert mixer.router is None
    torch.testing.assert_close(mixer(x).output, gated_delta_net(mixer)(x).output)


def test_all_memories_with_the_same_projections_are_the_inner_mixer():
    mixer, x = with_shared_weights(make("mom", num_memories=3, top_k=3, shared=False)), tokens()
    torch.testing.assert_close(mixer(x).output, gated_delta_net(mixer)(x).output)


def test_memories_without_a_token_stay_as_they_were():
    mixer, x = make("mom", num_memories=4, top_k=1), tokens(time=9)
    mixer.router.weight.data.zero_()
    mixer.router.weight.data[0] = 100 * x.mean((0, 1))  # memory 0 wins where the token points its way
    toward = x.mean((0, 1)).expand_as(x)
    before = mixer(x, use_state=True).state
    after = mixer(toward, state=before, use_state=True).state
    empty = mixer(toward, use_state=True).state
    assert bool((empty.states[:, 1:4] == 0).all())
    assert bool((empty.states[:, [0, 4]] != 0).any())
    torch.testing.assert_close(after.states[:, 1:4], before.states[:, 1:4], rtol=0, atol=0)
    torch.testing.assert_close(after.tails.k[:, 1:4], before.tails.k[:, 1:4], rtol=0, atol=0)
    assert isinstance(after.tails, ConvolutionTails)


@pytest.mark.parametrize("batch", [1, 3])
def test_in_training_nothing_comes_from_later_tokens_or_other_rows(batch):
    """Sub-sequences are packed behind one another: their convolutions must not reach across."""
    mixer, x = make("mom").train(), tokens(batch=batch)
    plain = mixer(x).output
    for t in (3, 11, 20):
        changed = x.clone()
        changed[0, t] += 1
        difference = (mixer(changed).output - plain).abs().amax(-1)
        assert bool((difference[0, :t] <= 1e-12).all())
        assert bool((difference[1:] <= 1e-12).all())
        assert difference[0, t] > 1e-6


def test_a_call_of_nothing_but_padding_changes_nothing():
    mixer, x = make("mom"), tokens()
    state = mixer(x, use_state=True).state
    padded = mixer(x, mask=torch.zeros(2, 23, dtype=torch.bool), state=state, use_state=True)
    assert bool((padded.output == 0).all())
    torch.testing.assert_close(padded.state.states, state.states, rtol=0, atol=0)


def test_padding_is_neither_routed_nor_counted(monkeypatch):
    monkeypatch.setattr(mixture_of_memories, "LARGEST_BUFFER", 5 * 3 * 32 * 8)
    mixer, x = make("mom").train(), tokens()
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, :9] = False
    load = mixer(x, mask=mask).losses["router_balance"]
    assert int(load.tokens) == 37
    assert load.choices.sum(1).tolist() == [37, 37]
    alone = mixer.load_of(x[mask])
    torch.testing.assert_close(load.probability, alone.probability)


def load(probability, top_k, weight=1.0):
    """A load from probabilities ``(tokens, E)``."""
    probability = torch.tensor(probability, dtype=torch.float64)
    chosen = probability.topk(top_k, -1).indices
    choices = torch.stack([torch.bincount(c, minlength=probability.shape[1]) for c in chosen.unbind(-1)])
    return RouterLoad(choices, probability.sum(0), torch.tensor(len(probability)), weight)


def test_the_balance_loss_by_hand():
    four = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]]
    first = 0.5 * 0.4 + 0.25 * 0.35 + 0.25 * 0.25  # shares of the first choices, times mean probabilities
    assert RouterLoad.pooled([load(four, 1)]).item() == pytest.approx(3 * first)
    two = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]
    second = (0.5 * 0.4 + 0.5 * 0.4) + (0.5 * 0.4 + 0.5 * 0.2)  # of the first choices, then of the second
    assert RouterLoad.pooled([load(two, 2)]).item() == pytest.approx(3 * second)
    one_sided = [[1.0, 0.0, 0.0]] * 5
    assert RouterLoad.pooled([load(one_sided, 1)]).item() == pytest.approx(3.0)
    balanced = RouterLoad(torch.full((2, 4), 5), torch.full((4,), 5.0), torch.tensor(20), 1.0)
    assert RouterLoad.pooled([balanced]).item() == pytest.approx(2.0)


def test_the_balance_loss_is_over_the_tokens_of_all_layers():
    """Two layers that are one-sided to different memories are balanced together, which a sum of losses is not."""
    left, right = load([[1.0, 0.0]] * 4, 1), load([[0.0, 1.0]] * 4, 1)
    assert RouterLoad.pooled([left, right]).item() == pytest.approx(1.0)
    assert RouterLoad.pooled([left]).item() == pytest.approx(2.0)
    together = total_loss([{"balance": left}, {}, {"balance": right, "other": torch.tensor(3.0)}])
    assert together.item() == pytest.approx(4.0)
    other_size = load([[1.0, 0.0, 0.0]] * 4, 1, weight=0.5)
    assert RouterLoad.pooled([left, right, other_size]).item() == pytest.approx(1.0 + 1.5)
    assert total_loss([{}, {}]) is None


def test_shares_show_dead_memories():
    shares = load([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0]], 1).shares()
    assert shares.tolist() == [1.0, 0.0, 0.0]


def test_the_model_adds_the_loss_once_and_in_training_only():
    torch.manual_seed(0)
    fields = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = SubquadForCausalLM(SubquadConfig(mixers={"name": "mom", "router_aux_weight": 0.3}, **fields))
    ids = torch.randint(0, 50, (2, 17))
    loads = []
    handles = [
        mixer.register_forward_hook(lambda module, arguments, output: loads.append(output.losses))
        for mixer in lm.model.mixers()
    ]
    trained = lm.train().loss_from_labels(ids, ids)
    parts, loads[:] = [part["router_balance"] for part in loads], []
    plain = lm.eval().loss_from_labels(ids, ids)
    assert loads == [{}, {}]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(trained, plain + RouterLoad.pooled(parts))
    assert 0.3 * 1.5 < RouterLoad.pooled(parts) < 0.3 * 4
    (gradient,) = torch.autograd.grad(RouterLoad.pooled(parts), lm.model.mixers()[0].router.weight)
    assert bool(gradient.abs().sum() > 0)


def test_a_memory_s_state_is_constant_and_counts_all_memories():
    mixer = make("mom", num_memories=5)
    state = mixer(tokens(time=40), use_state=True).state
    assert state.states.shape == (2, 6, 4, 8, 8)
    assert state.tails.v.shape == (2, 6, 3, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, r"top_k must lie in \[1, num_memories 4\]"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1, "shared": False}, "leaves the router no gradient"),
        ({"inner": "gated_delta"}, "did you mean 'gated_delta_rule'"),
        ({"inner": "softmax_attention"}, "inner recurrence"),
        ({"expand_k": 0.6}, "multiple of the number of heads"),
    ],
)
def test_bad_options_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make("mom", **options)


def test_a_state_of_other_memories_is_refused():
    state = make("mom", num_memories=3).init_state(2, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"state.states must be"):
        make("mom", num_memories=4)(tokens(), state=state)


def test_the_name_and_the_class():
    assert type(make("mom")) is MixtureOfMemories
