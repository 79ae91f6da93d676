"""The needle: where it stands, what is asked, and that both scorers agree with the text."""

import re

import pytest

from subquad import tasks


def test_the_question_is_answered_by_one_sentence_of_the_text():
    task = tasks.get("needle", length=1000)
    inputs, labels = task.batch(8, seed=0, index=0, split="test")
    for row, answers, (prompt, answer) in zip(inputs, labels, task.examples(8, seed=0, index=0)):
        assert bytes(row.tolist()).decode() == f"{prompt} {answer}"[:-1]
        assert bytes(answers[-5:].tolist()).decode() == answer
        assert (answers[:-5] == -100).all()
        name = re.search(r"The key of (\w+) is$", prompt)[1]
        assert re.findall(r"The key of (\w+) is (\d{5})\.", prompt) == [(name, answer)]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth(depth):
    """The sentence starts at depth x filler, moved back by less than one word."""
    task = tasks.get("needle", length=2000, depth=depth)
    filler_length = 2000 - task.minimum_length
    for prompt, _ in task.examples(20, seed=0, index=0):
        place = prompt.index("The key of")
        assert 0 <= depth * filler_length + 0.5 - place < 100
        assert place == 0 or prompt[place - 1] == " "


def test_random_depths_cover_the_text():
    places = [prompt.index("The key of") for prompt, _ in tasks.get("needle").examples(200, seed=0, index=0)]
    assert min(places) < 50
    assert max(places) > 350


def test_filler_of_the_splits_differs():
    task = tasks.get("needle", length=3000)
    pieces = {}
    for split in ("train", "test"):
        text = " ".join(prompt for prompt, _ in task.examples(20, seed=0, index=0, split=split))
        pieces[split] = {text[i : i + 60] for i in range(len(text) - 60)}
    assert len(pieces["test"]) > 10_000
    assert len(pieces["train"] & pieces["test"]) < 0.05 * len(pieces["test"])  # stock phrases of one manual


def test_longer_than_its_filler():
    (prompt, answer), *_ = tasks.get("needle").examples(1, seed=0, index=0, length=60_000)
    assert len(prompt) + 1 + len(answer) == 60_001


def test_scores():
    _, labels = tasks.get("needle").batch(6, seed=0, index=0, split="test")
    predictions = labels.clone()
    predictions[2, -3] += 1
    assert tasks.exact_match(predictions, labels).tolist() == [True, True, False, True, True, True]
    assert tasks.answer_matches(" 04217, of course", "04217")
    assert not tasks.answer_matches("4217", "04217")


@pytest.mark.parametrize("depth", [-0.1, 1.5, float("nan")])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match="depth must be between 0"):
        tasks.get("needle", depth=depth)
