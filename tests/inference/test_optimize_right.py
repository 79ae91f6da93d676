"""Where transformers' own way is wrong: ours equals the model's pass over each text alone."""

import pytest
import torch
from transformers import DynamicCache

from subquad import optimize
from subquad.bench.transformers_families import FAMILIES

IDS = torch.randint(2, 96, (3, 20), generator=torch.Generator().manual_seed(3))


def greedy_by_whole_passes(model, ids, tokens):
    """Tokens chosen one after another, each from a pass over the whole text so far, without any cache."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("name", ["rwkv", "minimax", "recurrent_gemma", "bamba"])
def test_rows_of_a_batch_do_not_mix_while_decoding(name):
    model = FAMILIES[name].build()
    expected = torch.cat([greedy_by_whole_passes(model, row[None], 5) for row in IDS])
    optimize(model)
    actual = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_left_padding_of_minimax_begins_with_a_linear_layer():
    model = FAMILIES["minimax"].build()
    expected = greedy_by_whole_passes(model, IDS[:1, 6:], 5)[:, 14:]
    optimize(model)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    actual = model.generate(input_ids=IDS * mask, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(actual[:1, 20:], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "minimax", "recurrent_gemma"])
def test_beams_score_what_they_say(name):
    """The log probability that beam search reports is that of its text under a whole pass."""
    model = FAMILIES[name].build()
    with optimize(model):
        found = model.generate(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=6,
            num_beams=4,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    logits = model(input_ids=found.sequences, use_cache=False).logits.log_softmax(-1)
    chosen = logits[:, 19:-1].gather(-1, found.sequences[:, 20:, None])[..., 0].sum(-1)
    torch.testing.assert_close(found.sequences_scores, chosen, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_texts_may_be_read_in_turns_by_recurrent_gemma():
    model = FAMILIES["recurrent_gemma"].build()
    expected = [model(input_ids=row[None], use_cache=False).logits for row in IDS[:2]]
    optimize(model)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for start, end in ((0, 8), (8, 9), (9, 20)):
        for row, (cache, whole) in enumerate(zip(caches, expected)):
            out = model(
                input_ids=IDS[row : row + 1, start:end],
                position_ids=torch.arange(start, end)[None],
                cache=cache,
                use_cache=True,
            )
            torch.testing.assert_close(out.logits, whole[:, start:end], rtol=1e-4, atol=1e-4)


def test_the_trap_is_still_there_without_us():
    """Once transformers carries states over, what is said of it in the documentation is out of date."""
    model = FAMILIES["mamba"].build()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        model(input_ids=IDS[:, :10], cache=cache, use_cache=True)
        second = model(input_ids=IDS[:, 10:], cache=cache, use_cache=True).logits
    assert float((second - whole[:, 10:]).abs().max()) > 0.1
