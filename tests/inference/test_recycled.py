"""Recycled attention: exact where it reads everything, and the definition where it does not."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from subquad.inference.recycled import MODES, RecycledLayer, importance, most_important, recycle
from tests.inference.test_hip import GREEDY, build, prompt

SIZES = {"max_partial": 12, "stride": 3, "pool": 3}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("options", [{"max_partial": 200, "stride": 4}, {"max_partial": 3, "stride": 1}])
def test_is_full_decoding_where_all_is_read(family, options):
    """A partial cache larger than the text, or every step a full one: token for token, beams and padding included."""
    model, (ids, mask) = build(family), prompt(time=40)
    for more in ({}, {"num_beams": 3}):
        expected = model.generate(ids, attention_mask=mask, **GREEDY, **more)
        with recycle(model, **options):
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **more), expected)


@pytest.mark.parametrize("mode", MODES)
def test_all_policies_read_everything_where_it_fits(mode):
    model, (ids, mask) = build(), prompt(time=40)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with recycle(model, mode=mode, max_partial=60):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_the_choice_is_the_top_of_pooled_weights_per_key_head():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 2, 31, 8, generator=generator)
    mask = torch.ones(2, 31, dtype=torch.bool)
    mask[1, :9] = False
    scores = importance(q, k, mask, 8**-0.5)[:, :, 0]
    found = most_important(scores, 6, 5, mask)
    for row in range(2):
        for head in range(2):
            products = q[row, 2 * head : 2 * head + 2, 0] @ k[row, head].T * 8**-0.5
            own = products.masked_fill(~mask[row], -torch.inf).softmax(-1).amax(0)
            torch.testing.assert_close(scores[row, head], own)
            pooled = [float(own[max(0, i - 2) : i + 3].max()) for i in range(31)]
            real = [i for i in range(31) if mask[row, i]]
            expected = sorted(real, key=lambda i: (-pooled[i], -float(own[i]), i))[:6]
            assert found[row, head].tolist() == expected


def test_padding_is_never_chosen():
    scores = torch.rand(1, 1, 9)
    mask = torch.arange(9)[None] >= 6
    assert sorted(most_important(scores, 5, 7, mask)[0, 0].tolist()) == [-1, -1, 6, 7, 8]


def step_by_step(model, ids, steps, **options):
    """Logits of teacher-forced steps, the cache, and the tokens."""
    tokens = torch.randint(1, 50, (1, steps), generator=torch.Generator().manual_seed(3))
    with recycle(model, **options):
        cache = Cache(layer_class_to_replicate=RecycledLayer)
        model(ids, cache=cache)
        logits = [model(tokens[:, i : i + 1], cache=cache).logits[:, 0] for i in range(steps)]
    return torch.stack(logits, 1), cache, tokens


def test_steps_equal_one_pass_under_the_mask_of_what_they_read():
    """One layer, so that its keys and values are exact: every step is attention over the whole or over its slots."""
    model, (ids, _) = build(num_hidden_layers=1), prompt(1, 40)
    tokens = torch.randint(1, 50, (1, 7), generator=torch.Generator().manual_seed(3))
    attention = model.model.layers[0].self_attn
    with recycle(model, **SIZES):
        cache = Cache(layer_class_to_replicate=RecycledLayer)
        model(ids, cache=cache)
        read, logits = [], []
        for i in range(7):
            logits.append(model(tokens[:, i : i + 1], cache=cache).logits[0, 0])
            full = cache.layers[0].since_check == 0
            read.append(None if full else cache.layers[0].partial.places[0].clone())
    assert [r is None for r in read] == [False, False, True, False, False, True, False]
    whole = torch.cat([ids, tokens], 1)
    dense = torch.full((4, 47, 47), -torch.inf).triu(1)
    for i, places in enumerate(read):
        if places is not None:
            for head in range(4):
                dense[head, 40 + i] = -torch.inf
                dense[head, 40 + i, places[head // 2][places[head // 2] >= 0]] = 0
                assert (dense[head, 40 + i] == 0).sum() == 13 or i == 0
    assert attention.num_key_value_groups == 2
    expected = model(whole, attention_mask=dense[None]).logits[0, 40:]
    torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-5, atol=1e-5)
    alone = Cache(layer_class_to_replicate=RecycledLayer)
    model(whole, cache=alone)
    torch.testing.assert_close(cache.layers[0].keys, alone.layers[0].keys)


def test_the_newest_token_is_read_and_the_least_important_goes():
    model, (ids, _) = build(), prompt(1, 40)
    _, cache, _ = step_by_step(model, ids, 8, max_partial=5, stride=100)
    for layer in cache.layers:
        assert (layer.partial.places.max(-1).values == 47).all()
        assert (layer.partial.places.sort(-1).values.diff(dim=-1) > 0).all()
        at = layer.partial.places[..., None].expand(-1, -1, -1, 8)
        assert torch.equal(layer.partial.keys, layer.keys.gather(2, at))


def test_policies_hold_what_they_say():
    model, (ids, _) = build(), prompt(1, 40)
    _, cache, _ = step_by_step(model, ids, 8, max_partial=7, mode="streaming", sinks=2)
    assert all(sorted(p.tolist()) == [0, 1, *range(42, 48)] for p in cache.layers[0].partial.places[0])
    _, cache, _ = step_by_step(model, ids, 8, max_partial=7, mode="snapkv")
    places = cache.layers[1].partial.places[0]
    assert all(len(set(p.tolist())) == 15 for p in places)
    assert all(set(range(40, 48)) < set(p.tolist()) for p in places)
    _, cache, _ = step_by_step(model, ids, 8, max_partial=7, mode="h2o")
    assert cache.layers[1].partial.places.shape[-1] == 8


def test_the_query_decides_where_a_threshold_is_given():
    model, (ids, _) = build(), prompt(1, 40)
    shares = []
    for threshold in (1.0, 1e-6):
        with recycle(model, **SIZES, threshold=threshold) as handle:
            model.generate(ids, **{**GREEDY, "max_new_tokens": 13})
            shares.append(handle.stats()["full_steps"])
    assert shares[0] == pytest.approx(1 / 3)
    assert shares[1] < shares[0]


def test_rows_are_what_they_are_alone_and_beams_move_everything():
    model, (ids, mask) = build(), prompt(time=60)
    with recycle(model, **SIZES) as handle:
        both = model.generate(ids, attention_mask=mask, **GREEDY)
        assert 0.2 < handle.stats()["read"] < 0.6
        assert torch.equal(both[1:, 60:], model.generate(ids[1:, 20:], **GREEDY)[:, 40:])
        cache = Cache(layer_class_to_replicate=RecycledLayer)
        model(ids[:1].expand(2, -1), cache=cache)
        model(torch.tensor([[5], [6]]), cache=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        again = model(torch.tensor([[7], [7]]), cache=cache).logits
        torch.testing.assert_close(again[0], again[1])


def test_cropping_makes_the_next_step_full():
    model, (ids, _) = build(), prompt(1, 40)
    with recycle(model, max_partial=5, stride=100):
        cache = Cache(layer_class_to_replicate=RecycledLayer)
        model(ids, cache=cache)
        model(torch.tensor([[7]]), cache=cache)
        cache.crop(-1)
        step = model(torch.tensor([[7]]), cache=cache).logits
    whole = model(torch.cat([ids, torch.tensor([[7]])], 1)).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_kind_is_refused():
    model, (ids, _) = build(), prompt(1, 40)
    with recycle(model, **SIZES):
        cache = model(ids).cache
        with pytest.raises(ValueError, match="layer_class_to_replicate=RecycledLayer"):
            model(torch.tensor([[7]]), cache=cache)


def test_options_are_saved_and_undo_leaves_nothing(tmp_path):
    model, (ids, _) = build(), prompt(1, 40)
    before, logits = set(vars(model)), model(ids).logits
    handle = recycle(model, **SIZES)
    model.save_pretrained(tmp_path)
    handle.undo()
    handle.undo()
    assert set(vars(model)) == before
    assert torch.equal(model(ids).logits, logits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with recycle(loaded) as again:
        assert (again.options.max_partial, again.options.stride, again.options.pool) == (12, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_partial": 0}, "max_partial"),
        ({"max_partial": 1.5}, "max_partial"),
        ({"max_partial": "few"}, "max_partial"),
        ({"stride": 0}, "stride"),
        ({"pool": 4}, "odd"),
        ({"threshold": 0.0}, "threshold"),
        ({"mode": "window"}, "mode must be one of"),
        ({"mode": "streaming", "max_partial": 5}, r"sinks \+ 2"),
        ({"size": 5}, "unknown options"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        recycle(build(), **options)
