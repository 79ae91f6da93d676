"""Tokenizers: lossless, ids that are bytes, and the same after saving and loading."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from subquad import tasks

BYTES = tasks.byte_tokenizer()
MERGED = tasks.train_bpe(tasks.prose_text().documents("valid"), 400)
AWKWARD = [
    "",
    " ",
    "\n\n\t\r\n",
    "🙂👩‍👩‍👧 é e\u0301",
    "<pad><eos>",
    "a<bos> b",
    "  two  spaces ",
    "x .  , !'s",
    "\u0000\u00a0\u00ad",
]


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join)))
def test_round_trip(text):
    assert BYTES(text)["input_ids"] == list(text.encode())
    for tokenizer in (BYTES, MERGED):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_come_after_the_bytes():
    assert len(BYTES) == BYTES.vocab_size == 259
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id) == (256, 257, 258)
    assert BYTES.decode([257, 104, 105, 258]) == "<bos>hi<eos>"
    assert BYTES.decode([257, 104, 105, 258], skip_special_tokens=True) == "hi"


def test_batches_are_padded_on_the_left():
    batch = BYTES(["ab", "é!!"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[256, 256, 97, 98], [195, 169, 33, 33]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "bpe"])
def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    assert loaded.padding_side == "left"
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    for text in [*AWKWARD, "A common sentence, with words."]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert set(loaded(AWKWARD, padding=True)) == {"input_ids", "attention_mask"}


def test_merges_shorten_text():
    assert len(MERGED) == 400
    text = tasks.prose_text().documents("test")[0]
    assert len(MERGED(text)["input_ids"]) < 0.8 * len(text.encode())


def test_training_is_repeatable():
    again = tasks.train_bpe(tasks.prose_text().documents("valid"), 400)
    assert again.get_vocab() == MERGED.get_vocab()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "error", "message"),
    [
        (["text"], 258, ValueError, "vocab_size must be at least 259; got 258"),
        (["text"], 512, ValueError, "the texts give a vocabulary of 26[0-9], not 512"),
        ("text", 512, TypeError, "wrap it in a list"),
    ],
)
def test_bad_training(texts, vocab_size, error, message):
    with pytest.raises(error, match=message):
        tasks.train_bpe(texts, vocab_size)
