"""Encoder and decoder learn pairs by heart and search well; a Hopfield memory recalls what it stored."""

import pytest
import torch

from subquad.models import EncoderDecoder, Hopfield
from subquad.models.seq2seq import WAYS


def pairs(count=32, length=5, vocab=12):
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(3, vocab, (count, length), generator=generator)
    for row, size in enumerate(torch.randint(2, length + 1, (count,), generator=generator).tolist()):
        source[row, size:] = 0
    target = torch.randint(3, vocab, (count, length), generator=generator)
    return source, torch.cat([target, torch.full((count, 1), 2)], 1)


def build(way="final_state", **options):
    torch.manual_seed(0)
    return EncoderDecoder(12, 12, 32, init_from=way, **options)


@pytest.mark.parametrize(("way", "cell"), [("final_state", "lstm"), ("every_step", "gru"), ("attention", "gru")])
def test_learns_pairs_by_heart(way, cell):
    model, (source, target) = build(way, cell=cell), pairs()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(source, target).backward()
        optimizer.step()
    expected = [row[:-1] for row in target.tolist()]
    for beams in (1, 3):
        assert model.generate(source, max_length=8, num_beams=beams) == expected


@pytest.mark.parametrize("way", WAYS)
def test_padding_of_a_source_changes_nothing(way):
    model, (source, target) = build(way, num_layers=2).double(), pairs()
    longer = torch.cat([source, torch.zeros(32, 3, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(longer, target), model(source, target))
    alone = model(source[3:4, : int((source[3] != 0).sum())], target[3:4])
    torch.testing.assert_close(model(source, target)[3:4], alone)


def test_a_source_is_read_backwards_within_its_length():
    model, (source, _) = build().double(), pairs()
    row = source[source.ne(0).sum(1).argmin()][None]
    size = int((row != 0).sum())
    forward = build(reverse_source=False).double()
    turned = torch.cat([row[:, :size].flip(1), row[:, size:]], 1)
    torch.testing.assert_close(model.encode(row).states[0].hidden, forward.encode(turned).states[0].hidden)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_predicted_from_those_before_it(way):
    model, (source, target) = build(way).double(), pairs()
    changed = target.clone()
    changed[:, 3:] = 4
    torch.testing.assert_close(model(source, changed)[:, :4], model(source, target)[:, :4])
    assert not torch.allclose(model(source, changed)[:, 4:], model(source, target)[:, 4:])


def test_more_beams_never_find_a_less_likely_target():
    model, (source, _) = build(), pairs(count=6)
    with torch.no_grad():
        model.head.bias[2] = 1.0
        model.head.weight *= 4

    def score(row, tokens):
        target = torch.tensor([[*tokens, 2]])
        return -float(model.loss(row[None], target).detach()) * (len(tokens) + 1)

    for row in source:
        greedy, many = (model.generate(row[None], max_length=6, num_beams=n, length_penalty=0.0)[0] for n in (1, 12))
        if len(greedy) < 6 and len(many) < 6:  # both ended by themselves: scores are those of whole targets
            assert score(row, many) >= score(row, greedy) - 1e-5


def test_bad_input_gets_a_sentence():
    model = build()
    with pytest.raises(ValueError, match="did you mean 'final_state'"):
        build("final_stat")
    with pytest.raises(ValueError, match="must stand at the end"):
        model.encode(torch.tensor([[0, 4, 5]]))
    with pytest.raises(ValueError, match="nothing but padding"):
        model.encode(torch.tensor([[4, 5], [0, 0]]))
    with pytest.raises(ValueError, match="nothing empty"):
        model.encode(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(torch.tensor([[4]]), num_beams=0)
    with pytest.raises(ValueError, match="tokens of the vocabularies"):
        EncoderDecoder(4, 2, 8)


def test_stored_patterns_come_back_from_a_tenth_of_flips():
    generator = torch.Generator().manual_seed(0)
    memory = Hopfield(200)
    patterns = torch.randint(2, (10, 200), generator=generator) * 2.0 - 1
    memory.store(patterns[:4])
    memory.store(patterns[4:])
    assert bool((memory.weight.diagonal() == 0).all())
    spoiled = patterns.clone()
    for row in spoiled:
        row[torch.randperm(200, generator=generator)[:20]] *= -1
    assert torch.equal(memory.recall(spoiled, generator=generator), patterns)


def test_energy_never_rises():
    generator = torch.Generator().manual_seed(1)
    memory = Hopfield(40)
    memory.store(torch.randint(2, (12, 40), generator=generator) * 2.0 - 1)
    memory.bias.normal_(generator=generator)
    states = torch.randint(2, (8, 40), generator=generator) * 2.0 - 1
    energy = memory.energy(states)
    for _ in range(10):
        states = memory.recall(states, sweeps=1, generator=generator)
        assert bool((memory.energy(states) <= energy + 1e-5).all())
        energy = memory.energy(states)
    with pytest.raises(ValueError, match="-1 and 1 only"):
        memory.recall(torch.zeros(1, 40))
    with pytest.raises(ValueError, match=r"must be \(rows, 40\)"):
        memory.store(torch.ones(1, 3))
