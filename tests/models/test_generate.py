"""Generation by transformers' own ``generate``, for every mixer: the cache changes the cost, never the tokens."""

import copy

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from subquad import tasks
from tests.models.cases import NAMES, model, prompt

names = pytest.mark.parametrize("name", NAMES)
GREEDY = {"do_sample": False, "max_new_tokens": 10}


@names
def test_greedy_with_cache_equals_without(name):
    lm, ids = model(name), prompt()
    with_cache = lm.generate(ids, **GREEDY)
    assert torch.equal(with_cache, lm.generate(ids, use_cache=False, **GREEDY))
    assert torch.equal(with_cache, lm.generate(ids, prefill_chunk_size=4, **GREEDY))


@names
def test_chunked_prefill_equals_one_prefill(name):
    lm, ids = model(name), prompt()
    with torch.no_grad():
        whole = lm(ids, use_cache=True)
        cache, logits = None, []
        for piece in ids.split([5, 1, 4, 3], 1):
            out = lm(piece, cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == whole.cache.get_seq_length() == 13


@names
@pytest.mark.parametrize("kind", [{"do_sample": False}, {"do_sample": False, "num_beams": 4}])
def test_a_left_padded_batch_equals_single_prompts(name, kind):
    lm, long, short = model(name), prompt(), prompt(7, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 6, dtype=torch.int64), short], 1)])
    together = lm.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=10, **kind)
    assert torch.equal(together[0, 13:], lm.generate(long, max_new_tokens=10, **kind)[0, 13:])
    assert torch.equal(together[1, 13:], lm.generate(short, max_new_tokens=10, **kind)[0, 7:])


@names
def test_sampling_is_reproducible(name):
    lm, ids = model(name), prompt()
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(lm.generate(ids, do_sample=True, top_k=20, max_new_tokens=10, num_return_sequences=2))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["gla", "gated_delta_net", "softmax"])
def test_a_cache_goes_on_from_a_copy_or_from_disk(name, tmp_path):
    lm, ids = model(name), prompt()
    expected = lm.generate(ids, **GREEDY)
    with torch.no_grad():
        cache = lm(ids[:, :-1], use_cache=True).cache
    cache.save(tmp_path / "state.safetensors")
    copied = copy.deepcopy(cache)
    for start in (copied, lm.load_cache(tmp_path / "state.safetensors")):
        assert torch.equal(lm.generate(ids, cache=start, **GREEDY), expected)
    with pytest.raises(ValueError, match="layers"):
        model(name, num_hidden_layers=3).load_cache(tmp_path / "state.safetensors")
    other = model("retention" if name != "retention" else "gla")
    with pytest.raises(ValueError, match="holds a state of layer 0"):
        other.load_cache(tmp_path / "state.safetensors")


def test_what_a_state_cannot_do_is_refused():
    lm, ids = model("gla"), prompt()
    with pytest.raises(ValueError, match="stateful"):
        lm.generate(ids, assistant_model=model("gla"), **GREEDY)
    with pytest.raises(ValueError, match="cache_implementation"):
        lm.generate(ids, cache_implementation="static", **GREEDY)
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="SubquadCache"):
        lm(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="taken back"):
        lm(ids, use_cache=True).cache.crop(1)


@pytest.mark.parametrize("name", ["gla", "softmax"])
def test_streaming_and_pipeline(name):
    lm, tokenizer = model(name, vocab_size=259, pad_token_id=256), tasks.byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = tokenizer("def f(", return_tensors="pt").input_ids
    expected = lm.generate(ids, **GREEDY)
    lm.generate(ids, streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(expected[0, ids.shape[1] :])
    generator = pipeline("text-generation", model=lm, tokenizer=tokenizer)
    text = generator("def f(", return_full_text=False, **GREEDY)[0]["generated_text"]
    assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "softmax"])
def test_constant_states_use_constant_memory(name):
    """Bytes of the state after 40 and after 400 tokens; the process's own memory is measured in benchmarks."""
    lm = model(name)
    with torch.no_grad():
        cache = lm(prompt(40), use_cache=True).cache
        size = cache.number_of_bytes()
        for _ in range(4):
            cache = lm(prompt(90), cache=cache, use_cache=True).cache
    assert cache.number_of_bytes() == size
