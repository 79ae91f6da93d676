"""Prefix linear attention as a mixer and in a language model: what sees what, generation, and the two-part loss."""

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.mixers.prefix import PrefixLinearAttention
from subquad.training import Batch, PrefixLM
from tests.mixers.cases import make, tokens

LAYERS = {"pattern": ["base_conv", "jrt", {"name": "sliding_window", "window_size": 5}, "jrt"]}


def model(**fields):
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    config = SubquadConfig(
        **{
            **small,
            "mixers": LAYERS,
            "positions": "none",
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            **fields,
        }
    )
    return SubquadForCausalLM(config).eval()


def prompt(length=13, seed=0):
    return torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def test_a_prefix_is_read_in_both_directions_and_the_rest_causally():
    mixer, x = make("jrt"), tokens()
    assert isinstance(mixer, PrefixLinearAttention)
    lengths = torch.tensor([9, 9])
    before = mixer(x, prefix_lengths=lengths).output
    for place, seen_from in ((5, 0), (14, 14)):
        changed = x.clone()
        changed[:, place] += 1
        difference = (mixer(changed, prefix_lengths=lengths).output - before).abs().sum((0, 2))
        assert (difference > 1e-12).nonzero().flatten().tolist() == list(range(seen_from, 23))


@pytest.mark.parametrize("feature_map", ["taylor", "elu+1", "hedgehog_softmax"])
def test_prefill_and_steps_equal_one_forward_at_every_split_after_the_prefix(feature_map):
    mixer, x = make("jrt", feature_map=feature_map), tokens()
    lengths = torch.tensor([9, 4])
    whole = mixer(x, prefix_lengths=lengths).output
    for cut in range(9, 23):
        head = mixer(x[:, :cut], prefix_lengths=lengths, use_state=True)
        outputs, state = [head.output], head.state
        for t in range(cut, 23):
            step = mixer(x[:, t : t + 1], state=state, use_state=True)
            outputs.append(step.output)
            state = step.state
        torch.testing.assert_close(torch.cat(outputs, 1), whole)


def test_padding_and_packing_with_prefixes_of_their_own():
    mixer, x = make("jrt"), tokens()
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, :8] = False
    lengths = torch.tensor([9, 4])
    spoiled = x.clone()
    spoiled[~mask] = 1e3
    padded = mixer(spoiled, mask=mask, prefix_lengths=lengths).output
    torch.testing.assert_close(padded[1:, 8:], mixer(x[1:, 8:], prefix_lengths=lengths[1:]).output)
    packed = mixer(x[:1], cu_seqlens=torch.tensor([0, 10, 10, 23]), prefix_lengths=torch.tensor([9, 0, 2])).output
    torch.testing.assert_close(packed[:, :10], mixer(x[:1, :10], prefix_lengths=torch.tensor([9])).output)
    torch.testing.assert_close(packed[:, 10:], mixer(x[:1, 10:], prefix_lengths=torch.tensor([2])).output)
    with pytest.raises(ValueError, match="count real tokens"):
        mixer(x, mask=mask, prefix_lengths=torch.tensor([9, 16]))


def test_not_causal_is_a_prefix_of_everything():
    causal, full, x = make("jrt"), make("jrt", causal=False), tokens()
    full.load_state_dict(causal.state_dict())
    torch.testing.assert_close(full(x).output, causal(x, prefix_lengths=torch.tensor([23, 23])).output)


def test_what_a_prefix_cannot_be_is_refused():
    mixer, x = make("jrt"), tokens()
    state = mixer(x, use_state=True).state
    with pytest.raises(ValueError, match="where a sequence begins"):
        mixer(x, state=state, prefix_lengths=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="exponential"):
        make("jrt", feature_map="hedgehog_exp")
    with pytest.raises(ValueError, match="negative"):
        make("jrt", feature_map="silu")


@pytest.mark.parametrize("mixers", [LAYERS, "softmax"])
@pytest.mark.parametrize("kind", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}])
def test_generation_reads_the_prompt_as_its_prefix(mixers, kind):
    lm, ids = model(mixers=mixers, prefix_lm=True), prompt()
    kind = {**kind, "max_new_tokens": 8}
    generated = lm.generate(ids, **kind)
    assert torch.equal(lm.generate(ids, use_cache=False, **kind), generated)
    if "num_beams" not in kind:
        sequence = ids
        for _ in range(8):
            logits = lm(sequence, prefix_lengths=torch.tensor([13]), use_cache=False).logits
            sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(sequence, generated)
    short = prompt(7, seed=1)
    batch = torch.cat([ids, torch.cat([torch.zeros(1, 6, dtype=torch.int64), short], 1)])
    together = lm.generate(batch, attention_mask=(batch != 0).long(), **kind)
    assert torch.equal(together[0, 13:], generated[0, 13:])
    assert torch.equal(together[1, 13:], lm.generate(short, **kind)[0, 7:])
    with pytest.raises(ValueError, match="one call"):
        lm.generate(ids, prefill_chunk_size=4, **kind)


def test_the_prefix_changes_what_is_generated_from():
    lm, ids = model(), prompt()
    with torch.no_grad():
        plain = lm(ids).logits
        seen = lm(ids, prefix_lengths=torch.tensor([13])).logits
        none = lm(ids, prefix_lengths=torch.tensor([0])).logits
    torch.testing.assert_close(none, plain)
    assert not torch.allclose(seen[:, -1], plain[:, -1], rtol=1e-2)


def test_models_refuse_what_a_prefix_makes_meaningless():
    lm, ids = model(), prompt()
    lengths = torch.tensor([6])
    with pytest.raises(ValueError, match="labels inside a prefix"):
        lm(ids, labels=ids, prefix_lengths=lengths)
    labels = ids.clone()
    labels[:, :7] = -100
    out = lm(ids, labels=labels, prefix_lengths=lengths)
    expected = torch.nn.functional.cross_entropy(out.logits[0, 6:-1], ids[0, 7:])
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(ValueError, match="go on from a cache"):
        lm(ids, cache=out.cache, prefix_lengths=lengths)
    with pytest.raises(ValueError, match="there is GatedLinearAttention"):
        model(mixers="gla")(ids, prefix_lengths=lengths)
    first, second = prompt(6), prompt(7, seed=1)
    packed = lm(
        torch.cat([first, second], 1), cu_seq_lens_q=torch.tensor([0, 6, 13]), prefix_lengths=torch.tensor([4, 7])
    ).logits
    separate = [lm(x, prefix_lengths=torch.tensor([n])).logits for x, n in ((first, 4), (second, 7))]
    torch.testing.assert_close(packed, torch.cat(separate, 1), rtol=1e-4, atol=1e-4)


def test_the_loss_has_two_parts():
    """Six tokens, a prefix of three: the parts by hand, with the token id 0 among those that are masked."""
    lm = model(pad_token_id=None)
    inputs = torch.tensor([[0, 7, 0, 9, 11, 12]])
    labels = torch.tensor([[7, 0, 9, 11, 12, 13]])
    torch.manual_seed(3)
    objective = PrefixLM(mask_token_id=49, prefix=3, mask_rate=0.6)
    loss, metrics = objective(lm, Batch(inputs, labels))
    torch.manual_seed(3)
    torch.randint(3, 4, (1,))
    masked = (torch.rand(1, 6) < 0.6) & (torch.arange(6) < 3)
    assert bool(masked[0, [0, 2]].any())
    logits = lm(inputs.where(~masked, 49), prefix_lengths=torch.tensor([3])).logits[0]
    after = torch.nn.functional.cross_entropy(logits[3:], labels[0, 3:])
    inside = torch.nn.functional.cross_entropy(logits[masked[0]], inputs[masked])
    torch.testing.assert_close(loss, after + 0.25 * inside)
    torch.testing.assert_close(metrics["masked share"], masked.sum() / 3)
    plain, _ = PrefixLM(mask_token_id=49, prefix=3, mask_rate=0.0)(lm, Batch(inputs, labels))
    logits = lm(inputs, prefix_lengths=torch.tensor([3])).logits[0]
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits[3:], labels[0, 3:]))


def test_the_share_of_masked_tokens_and_prefixes_of_drawn_lengths():
    class Seen:
        def loss_from_labels(self, inputs, labels, *, weights, prefix_lengths):
            self.inputs, self.labels, self.weights, self.lengths = inputs, labels, weights, prefix_lengths
            return weights.sum()

    torch.manual_seed(0)
    seen, inputs = Seen(), torch.randint(1, 50, (200, 128))
    _, metrics = PrefixLM(mask_token_id=0, prefix=(32, 96))(seen, Batch(inputs, inputs.roll(-1, 1)))
    assert 0.14 < float(metrics["masked share"]) < 0.16
    assert (int(seen.lengths.min()), int(seen.lengths.max())) == (32, 96)
    inside = torch.arange(128) < seen.lengths[:, None]
    assert not bool((seen.inputs != inputs)[~inside].any())
    assert bool(((seen.labels == -100) == (inside & (seen.inputs != 0))).all())
    torch.testing.assert_close(seen.weights.sum(), torch.tensor(1.25))
    for wrong in (
        {"prefix": -1},
        {"prefix": (3, 2)},
        {"mask_token_id": -1},
        {"mask_token_id": None},
        {"mask_rate": 1.0},
    ):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            PrefixLM(**{"mask_token_id": 0, "prefix": 3, **wrong})
    with pytest.raises(ValueError, match="leaves nothing"):
        PrefixLM(mask_token_id=0, prefix=128)(seen, Batch(inputs, inputs))


def test_jrt_preset():
    config = SubquadConfig.preset("jrt_360m")
    assert [n for n, entry in enumerate(config.mixers) if entry == "jrt"] == [1, 6, 11, 16, 21]
    assert (len(config.mixers), config.prefix_lm) == (26, True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SubquadForCausalLM(config).parameters())
        based = sum(p.numel() for p in SubquadForCausalLM(SubquadConfig.preset("based_360m")).parameters())
    assert abs(parameters / based - 1) < 0.02
