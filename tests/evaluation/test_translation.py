"""BLEU and the word error rate on cases that can be counted by hand."""

import math

import pytest

from subquad.evaluation.translation import bleu, clipped_precision, word_error_rate


def words(text):
    return text.split()


def test_bleu_by_hand():
    reference = words("the cat is on the mat")
    assert clipped_precision(words("the the the the the the the"), [reference], 1) == pytest.approx(2 / 7)
    assert bleu([reference], [[reference]]) == 1.0
    assert bleu([words("a b")], [[words("a b")]]) == 0.0  # no 4-gram is there at all
    short = words("the cat is on")
    assert bleu([short], [[reference]]) == pytest.approx(math.exp(1 - 6 / 4))
    # one word of six is wrong: 5/6, 4/5 - one bigram less on either side, and so on
    wrong = words("the cat is on the hat")
    assert bleu([wrong], [[reference]]) == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_the_nearest_reference_decides_the_length():
    candidate = words("a b c d e")
    assert bleu([candidate], [[words("a b c d e"), words("a b c d e f g h")]]) == 1.0
    with pytest.raises(ValueError, match="needs references"):
        bleu([candidate], [])


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    candidates = ["the cat sat on the mat today", "a quick brown fox jumps over dogs"]
    references = ["the cat sat on a mat today", "the quick brown fox jumps over the dog"]
    expected = sacrebleu.corpus_bleu(candidates, [references], tokenize="none", smooth_method="none").score / 100
    assert bleu(list(map(words, candidates)), [[words(r)] for r in references]) == pytest.approx(expected)


def test_word_error_rate_counts_edits():
    assert word_error_rate([words("a b c")], [words("a b c")]) == 0.0
    assert word_error_rate([words("a c"), words("x y")], [words("a b c"), words("x")]) == 2 / 4
    with pytest.raises(ValueError, match="not all empty"):
        word_error_rate([[]], [[]])
