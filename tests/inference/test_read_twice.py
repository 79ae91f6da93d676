"""Prompts that hold their context twice, and the state that many questions share."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from subquad import SubquadConfig, SubquadForCausalLM, tasks
from subquad.inference.read_twice import JustReadTwice, read_twice_state

TOKENIZER = tasks.byte_tokenizer()


def gru():
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SubquadForCausalLM(SubquadConfig(vocab_size=len(TOKENIZER), mixers="gru", **fields)).eval()


def llama(**fields):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_key_value_heads=2, **shape, **fields)
    return LlamaForCausalLM(config).eval()


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_prompts_hold_the_context_as_often_as_asked():
    assert text_of(JustReadTwice(TOKENIZER).prompt("fact", "what?")) == "fact\nfact\nwhat?"
    assert text_of(JustReadTwice(TOKENIZER, repeats=3).prompt("fact", "what?")) == "fact\nfact\nfact\nwhat?"
    reader = JustReadTwice(TOKENIZER, template="Of {question}: {context} / {context}")
    assert (text_of(reader.prompt("fact", "it")), reader.repeats) == ("Of it: fact / fact", 2)


def test_both_copies_are_cut_alike():
    reader = JustReadTwice(TOKENIZER, max_tokens=20)
    ids = reader.prompt("0123456789abcdef", "what?")
    assert len(ids) <= 20
    first, second, question = text_of(ids).split("\n")
    assert first == second == "0123456789abcdef"[: len(first)]
    assert (len(first), question) == (6, "what?")


@pytest.mark.parametrize("build", [gru, llama])
def test_the_shared_state_is_that_of_the_prompt(build):
    model = build()
    context, question = torch.randint(3, 200, (2, 7)), torch.randint(3, 200, (2, 4))
    separator = torch.full((2, 1), 11)
    cache, length = read_twice_state(model, context, separator_ids=separator)
    prompt = torch.cat([context, separator, context, question], 1)
    assert length == 15
    with torch.no_grad():
        expected = model(input_ids=prompt).logits[:, -4:]
        for _ in range(2):  # the copy leaves it as it was
            found = model(input_ids=question, cache=copy.deepcopy(cache), use_cache=True).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [gru, llama])
def test_a_batch_answers_as_each_prompt_alone(build):
    model, reader = build(), JustReadTwice(TOKENIZER)
    contexts, questions = ["one fact", "another, longer fact"], ["a?", "b?"]
    together = reader.answer(model, contexts, questions, max_new_tokens=5)
    alone = [reader.answer(model, [c], [q], max_new_tokens=5)[0] for c, q in zip(contexts, questions)]
    assert together == alone


def test_bad_input_is_refused():
    for template in ("{question}", "{context}{question}{question}", "{context}{other}"):
        with pytest.raises(ValueError, match="template"):
            JustReadTwice(TOKENIZER, template=template)
    with pytest.raises(ValueError, match="integer >= 1"):
        JustReadTwice(TOKENIZER, repeats=0)
    with pytest.raises(ValueError, match="empty"):
        JustReadTwice(TOKENIZER).prompt("")
    with pytest.raises(ValueError, match="no room"):
        JustReadTwice(TOKENIZER, max_tokens=5).prompt("context", "a question")
    with pytest.raises(ValueError, match="one question per context"):
        JustReadTwice(TOKENIZER).batch(["a"], [])
    with pytest.raises(ValueError, match="batch, time"):
        read_twice_state(gru(), torch.tensor([1, 2]))
    with pytest.warns(UserWarning, match="positions"):
        JustReadTwice(TOKENIZER).answer(llama(max_position_embeddings=8), ["ab"], ["c"], max_new_tokens=2)
