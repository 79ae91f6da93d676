"""Texts: no document in two splits, windows that are what they say, and the bigram bar computed again by hand."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import tasks
from subquad.tasks import TextData


def some_documents(count=200, seed=0):
    """Documents of 50 to 250 random letters, so that no two share a line."""
    rng = np.random.default_rng(seed)
    return [rng.integers(97, 123, size, dtype=np.uint8).tobytes() for size in rng.integers(50, 251, count)]


def test_splits_are_whole_documents():
    documents = some_documents()
    data = TextData.from_documents(documents, "test")
    assert data.split_by == "document"
    parts = {split: data.tokens(split).tobytes().split(b"\0") for split in ("train", "valid", "test")}
    assert sorted(itertools.chain(*parts.values())) == sorted(documents)
    total = sum(map(len, documents))
    for split in ("valid", "test"):
        assert 0.05 <= sum(map(len, parts[split])) / total < 0.05 + 250 / total
    order = {document: i for i, document in enumerate(documents)}
    assert parts["train"] == sorted(parts["train"], key=order.__getitem__)


def test_the_split_depends_on_the_texts_alone_and_keeps_copies_together():
    documents = some_documents()
    copies = documents + documents[:100]
    one = TextData.from_documents(copies, "one")
    other = TextData.from_documents(copies[::-1], "other")
    for split in ("train", "valid", "test"):
        assert Counter(one.documents(split)) == Counter(other.documents(split))
    assert not set(one.documents("train")) & set(one.documents("test"))
    assert not set(one.documents("train")) & set(one.documents("valid"))


def test_one_document_is_cut_by_position_at_line_ends():
    lines = [f"line {i} é\n" for i in range(2000)]
    text = "".join(lines).encode()
    data = TextData.from_documents([text], "test")
    assert data.split_by == "position"
    assert data.train.tobytes() + data.valid.tobytes() + data.test.tobytes() == text
    for split in ("train", "valid"):
        assert data.tokens(split)[-1] == ord("\n")
    assert abs(len(data.train) / len(text) - 0.9) < 0.01
    assert abs(len(data.valid) / len(text) - 0.05) < 0.01


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=10), st.integers(50, 70))
def test_a_cut_never_divides_a_character(text, times):
    text *= times
    data = TextData.from_documents([text.encode()], "test")
    assert "".join(data.tokens(split).tobytes().decode() for split in ("train", "valid", "test")) == text


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "holds no text"), ([b"", b""], "holds no text"), ([b"abcdef"], "too little text.*train 5, valid 1, test 0")],
)
def test_too_little_text(documents, message):
    with pytest.raises(ValueError, match=message):
        TextData.from_documents(documents, "nothing")


def test_windows_are_shifted_pieces_of_their_split():
    data = TextData.from_documents(some_documents(), "test")
    inputs, labels = data.windows("test", 32, 50, seed=0, index=0)
    assert inputs.shape == labels.shape == (50, 32)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    held_out = data.test.tobytes()
    for row, label in zip(inputs.tolist(), labels[:, -1].tolist()):
        assert bytes([*row, label]) in held_out
    again = data.windows("test", 32, 50, seed=0, index=0)
    assert torch.equal(inputs, again.inputs)
    assert not torch.equal(inputs, data.windows("test", 32, 50, seed=0, index=1).inputs)


def test_the_longest_window_is_the_whole_split():
    data = TextData.from_documents([b"abcdefghij" * 20], "test")
    length = len(data.test) - 1
    inputs, labels = data.windows("test", length, 3, seed=0, index=0)
    assert inputs.tolist() == [data.test[:-1].tolist()] * 3
    assert labels.tolist() == [data.test[1:].tolist()] * 3
    with pytest.raises(ValueError, match=f"a window of {length + 1} needs {length + 2} tokens; test of test has"):
        data.windows("test", length + 1, 3, seed=0, index=0)
    with pytest.raises(ValueError, match="a window of"):
        data.eval_windows("test", length + 1)


def test_eval_windows_cover_the_split_once():
    data = TextData.from_documents(some_documents(), "test")
    batches = list(data.eval_windows("test", 32, batch_size=4))
    count = (len(data.test) - 1) // 32
    labels = torch.cat([batch.labels for batch in batches]).flatten()
    inputs = torch.cat([batch.inputs for batch in batches]).flatten()
    assert labels.tolist() == data.test[1 : 1 + 32 * count].tolist()
    assert inputs.tolist() == data.test[: 32 * count].tolist()
    assert {len(batch.inputs) for batch in batches[:-1]} == {4}


def test_eval_windows_limit_spreads_over_the_split():
    data = TextData.from_documents(some_documents(), "test")
    every = torch.cat([batch.inputs for batch in data.eval_windows("train", 32)])
    some = torch.cat([batch.inputs for batch in data.eval_windows("train", 32, limit=5, batch_size=2)])
    assert torch.equal(some, every[[i * len(every) // 5 for i in range(5)]])
    more = torch.cat([batch.inputs for batch in data.eval_windows("train", 32, limit=10**6)])
    assert torch.equal(more, every)


def test_bigram_bits_by_hand():
    data = TextData.from_documents(some_documents(60), "test")
    train, held_out = data.train.tolist(), data.valid.tolist()
    pairs, firsts = Counter(itertools.pairwise(train)), Counter(train[:-1])
    bits = [-math.log2((pairs[a, b] + 1) / (firsts[a] + 256)) for a, b in itertools.pairwise(held_out)]
    assert data.bigram_bits("valid") == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_tokenized_text_keeps_documents_and_bytes():
    data = TextData.from_documents(some_documents(), "test")
    tokenizer = tasks.byte_tokenizer()
    tokenized = data.tokenized(tokenizer)
    assert tokenized.vocab_size == 259
    assert tokenized.num_bytes == data.num_bytes
    for split in ("train", "valid", "test"):
        tokens = tokenized.tokens(split)
        assert tokens[-1] == 258
        assert (tokens[:-1][tokens[:-1] != 258] == data.tokens(split)[data.tokens(split) != 0]).all()
        assert (tokens == 258).sum() == len(data.documents(split))
    for method in (tokenized.bigram_bits, lambda: tokenized.documents("train")):
        with pytest.raises(ValueError, match="needs text as bytes"):
            method()


@pytest.mark.parametrize(
    "data", [tasks.source_text("tiny"), tasks.source_text("standard"), tasks.prose_text()], ids=lambda data: data.source
)
def test_what_python_carries(data):
    assert data.split_by == "document"
    sizes = [len(data.tokens(split)) for split in ("train", "valid", "test")]
    assert sum(sizes) > 300_000
    for size in sizes[1:]:
        assert 0.05 * 0.99 <= size / sum(sizes) <= 0.12
    assert 3 < data.bigram_bits("test") < 4.5  # English and Python lie near 3.6
    assert not data.train.flags.writeable
    with pytest.raises(ValueError, match="did you mean 'test'"):
        data.tokens("tets")


@pytest.mark.parametrize("data", [tasks.source_text("tiny"), tasks.prose_text()], ids=lambda data: data.source)
def test_held_out_text_is_new(data):
    """Few pieces of 60 bytes stand in train too: at most 3.1% in Python 3.11 to 3.13, 40% to 70% in whole topics."""
    train = data.train.tobytes()
    known = {hash(train[i : i + 60]) for i in range(len(train) - 60)}
    for held_out in (data.valid.tobytes(), data.test.tobytes()):
        count = len(held_out) - 60
        assert sum(hash(held_out[i : i + 60]) in known for i in range(count)) < 0.05 * count


def test_source_files_have_no_heading():
    documents = tasks.source_text("standard").documents("train")
    assert len(documents) > 100
    assert not any(document.startswith(("#", "\n")) for document in documents)
    with pytest.raises(ValueError, match="size must be one of 'tiny', 'standard'"):
        tasks.source_text("tny")
