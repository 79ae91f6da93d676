"""Titans' mixers equal their definitions written out; memory and attention see what they may and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from subquad import mixers
from subquad.layers.norms import l2_normalize
from subquad.mixers.neural_memory import NeuralMemory
from subquad.mixers.titans import TitansMAC, TitansMAG, TitansMAL
from subquad.ops.neural_memory.network import Descent, MemoryNetwork
from subquad.ops.neural_memory.reference import neural_memory_reference
from subquad.positions.rope import apply_rope
from tests.mixers.cases import make, tokens

TITANS = ["titans_mac", "titans_mag", "titans_mal"]


def convolved(x, convolution):
    """SiLU of the causal convolution of ``(B, T, channels)``, by torch's own."""
    width = convolution.weight.shape[1]
    y = F.conv1d(F.pad(x.mT, (width - 1, 0)), convolution.weight[:, None], groups=x.shape[-1])
    return F.silu(y.mT)


def remembered(memory, x):
    """The memory mixer written out: the definition's token loop on its projections."""
    q, k, v = (
        convolved(project(x), convolution).unflatten(-1, (memory.num_heads, -1))
        for project, convolution in (
            (memory.q_proj, memory.convolutions.q),
            (memory.k_proj, memory.convolutions.k),
            (memory.v_proj, memory.convolutions.v),
        )
    )
    logits = memory.gates.proj(x).unflatten(-1, (3, -1)) + memory.gates.bias
    forget, momentum, step = torch.sigmoid(logits).unbind(-2)
    first = torch.cat([w.flatten(1) for w in memory.first.layers], -1).expand(x.shape[0], -1, -1)
    o, (weights, *_) = neural_memory_reference(
        l2_normalize(q),
        l2_normalize(k),
        v,
        forget,
        momentum,
        step / memory.chunk_size,
        state=(first, torch.zeros_like(first), first, torch.zeros(x.shape[0], dtype=torch.int64)),
        lengths=torch.full((x.shape[0],), x.shape[1]),
        descent=Descent(MemoryNetwork(memory.widths, False), memory.chunk_size, None),
    )
    return memory.o_proj(memory.o_norm(o).flatten(-2)), weights


def attended(attention, query_tokens, key_tokens, query_at, key_at, visible):
    """Softmax attention of a layer with these projections, positions and visibility ``(T, S)``."""
    q, k, v = (
        project(y).unflatten(-1, (4, -1))
        for project, y in (
            (attention.q_proj, query_tokens),
            (attention.k_proj, key_tokens),
            (attention.v_proj, key_tokens),
        )
    )
    q, k = apply_rope(q, query_at), apply_rope(k, key_at)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return attention.o_proj(torch.einsum("bhij,bjhk->bihk", weights, v).flatten(-2))


def in_window(attention, x, window, sinks):
    at = torch.arange(x.shape[1])
    distance = at[:, None] - at
    visible = (distance >= 0) & ((distance < window) | (at < sinks))
    return attended(attention, x, x, at, at, visible)


def test_the_memory_mixer_written_out():
    mixer, x = make("neural_memory"), tokens()
    torch.testing.assert_close(mixer(x).output, remembered(mixer, x)[0])


def test_memory_as_a_gate_written_out():
    mixer, x = make("titans_mag"), tokens()
    both = torch.cat([mixer.persistent.tokens.expand(2, -1, -1), x], 1)
    gate = torch.sigmoid(mixer.memory_norm(remembered(mixer.memory, both)[0]))
    expected = mixer.attention_norm(in_window(mixer.attention, both, 5, 2)) * gate
    torch.testing.assert_close(mixer(x).output, expected[:, 2:])


def test_memory_as_a_layer_written_out():
    mixer, x = make("titans_mal"), tokens()
    both = torch.cat([mixer.persistent.tokens.expand(2, -1, -1), x], 1)
    expected = in_window(mixer.attention, remembered(mixer.memory, both)[0], 5, 2)
    torch.testing.assert_close(mixer(x).output, expected[:, 2:])


def test_memory_as_context_written_out():
    """Segment by segment; the memory before each is had by learning from all of y so far again."""
    mixer, x = make("titans_mac"), tokens()
    memory, size = mixer.memory, 6
    query = l2_normalize(convolved(memory.q_proj(x), memory.convolutions.q).unflatten(-1, (4, -1)))
    network = MemoryNetwork(memory.widths, False)
    weights = torch.cat([w.flatten(1) for w in memory.first.layers], -1).expand(2, -1, -1)
    y = x[:, :0]
    for start in range(0, x.shape[1], size):
        own = x[:, start : start + size]
        answers = network.output(network.layers(weights), query[:, start : start + size].transpose(1, 2))
        answers = memory.o_proj(memory.o_norm(answers.transpose(1, 2)).flatten(-2))
        width = own.shape[1]
        at = 2 + torch.arange(width)
        keys = torch.cat([mixer.persistent.tokens.expand(2, -1, -1), answers, own], 1)
        key_at = torch.cat([torch.arange(2), at, at])
        visible = (key_at <= at[:, None]) | (torch.arange(len(key_at)) < 2)
        y = torch.cat([y, attended(mixer, own, keys, at, key_at, visible)], 1)
        output, weights = remembered(memory, y)
    expected = mixer.attention_norm(y) * mixer.memory_norm(output)
    torch.testing.assert_close(mixer(x).output, expected)


@pytest.mark.parametrize("name", TITANS)
def test_a_token_changes_itself_and_what_comes_after(name):
    """At the borders of segments and chunks, and inside: nothing before it, the token itself, and the next segment."""
    mixer, x = make(name), tokens()
    plain = mixer(x).output
    for t in (0, 2, 3, 5, 6, 11, 12, 17, 22):
        changed = x.clone()
        changed[:, t] += 1
        difference = (mixer(changed).output - plain).abs().amax(-1)
        assert bool((difference[:, :t] <= 1e-12).all())
        assert bool((difference[:, t:] > 1e-12).all())


def test_the_memory_reaches_beyond_window_and_convolution():
    x = tokens(time=40)
    changed = x.clone()
    changed[:, 0] += 1
    for name in TITANS:
        mixer = make(name)
        assert (mixer(changed).output - mixer(x).output)[:, -1].abs().max() > 1e-9
    window = mixers.build("sliding_window", 32, num_heads=4, window_size=5).double()
    assert (window(changed).output - window(x).output)[:, -1].abs().max() == 0


def test_the_order_of_persistent_tokens_does_not_matter_without_positions():
    mixer, x = make("titans_mac", rope_base=None, num_persistent=5), tokens()
    plain = mixer(x).output
    mixer.persistent.tokens.data = mixer.persistent.tokens.data.flip(0)
    torch.testing.assert_close(mixer(x).output, plain)
    assert not torch.allclose(make("titans_mac", rope_base=None, num_persistent=4)(x).output, plain)


@pytest.mark.parametrize("name", TITANS)
def test_persistent_tokens_may_be_left_out(name):
    mixer, x = make(name, num_persistent=0), tokens()
    assert mixer.persistent is None
    head = mixer(x[:, :9], use_state=True)
    tail = mixer(x[:, 9:], state=head.state).output
    torch.testing.assert_close(torch.cat([head.output, tail], 1), mixer(x).output)


def test_a_state_starts_after_the_persistent_tokens():
    mixer = make("titans_mag")
    state = mixer.init_state(2, torch.float64, "cpu")
    assert state.attention.positions.tolist() == [[0, 1]] * 2
    assert state.memory.memory.filled.tolist() == [2, 2]


def test_learning_goes_on_at_inference():
    """A memory that has read the same tokens before answers them differently, and longer."""
    mixer, x = make("neural_memory"), tokens(time=20)
    with torch.no_grad():
        _, state, _ = mixer(x, use_state=True)
        first = state.memory.weights
        _, again, _ = mixer(x, state=state, use_state=True)
    assert (again.memory.weights - first).norm() > 0
    assert not again.memory.weights.requires_grad


@pytest.mark.parametrize("chunk_size", [4, 16])
def test_equal_tokens_do_not_make_it_diverge(chunk_size):
    """Filler: the C steps of a chunk go the same way. The default step keeps them within one descent."""
    torch.manual_seed(0)
    mixer = NeuralMemory(32, 2, chunk_size=chunk_size)
    output, state, _ = mixer(torch.ones(1, 600, 32), use_state=True)
    assert bool(torch.isfinite(output).all())
    assert state.memory.weights.abs().max() < 10


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neural_memory", {"memory_layers": 0}, "memory_layers must be at least 1"),
        ("neural_memory", {"chunk_size": 0}, "chunk_size must be at least 1"),
        ("neural_memory", {"max_step": 0.0}, "max_step must be positive"),
        ("neural_memory", {"expansion": 0.0}, "hidden layer of width 0"),
        ("titans_mac", {"segment_size": 6, "chunk_size": 4}, "chunk_size must divide segment_size"),
        ("titans_mac", {"num_persistent": -1}, "num_persistent"),
        ("titans_mag", {"window_size": 0}, "window_size must be at least 1"),
        ("titans_mal", {"num_persistent": -1}, "num_persistent"),
        ("titans_mac", {"head_dim": 3}, "even head width"),
    ],
)
def test_bad_options_get_a_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_names_and_classes():
    assert [type(make(name)) for name in TITANS] == [TitansMAC, TitansMAG, TitansMAL]
