"""How near a text is to its references: BLEU (Papineni et al. 2002) and the word error rate."""

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[object]
ORDERS = (1, 2, 3, 4)


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Corpus BLEU in [0, 1]: the geometric mean of clipped n-gram precisions, n = 1..4, times the brevity penalty.

    Args:
        candidates: token sequences.
        references: for each candidate one or more.

    Raises:
        ValueError: no candidates, or numbers that differ.

    Example:
        >>> round(clipped_precision("the the the the the the the".split(), ["the cat is on the mat".split()], 1), 4)
        0.2857
        >>> bleu(["a b c d e".split()], [["a b c d e".split()]])
        1.0
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError(f"every candidate needs references; got {len(candidates)} and {len(references)}")
    hits, totals = [0] * len(ORDERS), [0] * len(ORDERS)
    length = nearest = 0
    for candidate, own in zip(candidates, references):
        length += len(candidate)
        nearest += min((abs(len(r) - len(candidate)), len(r)) for r in own)[1]
        for i, n in enumerate(ORDERS):
            hit, total = _matches(candidate, own, n)
            hits[i] += hit
            totals[i] += total
    if not all(hits):
        return 0.0
    penalty = min(1.0, math.exp(1 - nearest / length))
    return penalty * math.exp(sum(math.log(h / t) for h, t in zip(hits, totals)) / len(ORDERS))


def clipped_precision(candidate: Tokens, references: Sequence[Tokens], n: int) -> float:
    """Share of the candidate's n-grams that a reference has, each counted at most as often as there."""
    hits, total = _matches(candidate, references, n)
    return hits / total if total else 0.0


def word_error_rate(candidates: Sequence[Tokens], references: Sequence[Tokens]) -> float:
    """Insertions, deletions and substitutions that lead from references to candidates, over the references' words.

    Example:
        >>> word_error_rate(["a x c".split()], ["a b c d".split()])
        0.5
    """
    if len(candidates) != len(references) or not any(map(len, references)):
        raise ValueError(
            f"every candidate needs one reference, not all empty; got {len(candidates)}, {len(references)}"
        )
    edits = sum(map(_distance, candidates, references))
    return edits / sum(map(len, references))


def _grams(tokens: Tokens, n: int) -> Counter[tuple[object, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _matches(candidate: Tokens, references: Sequence[Tokens], n: int) -> tuple[int, int]:
    found, allowed = _grams(candidate, n), Counter[tuple[object, ...]]()
    for reference in references:
        allowed |= _grams(reference, n)
    return sum((found & allowed).values()), sum(found.values())


def _distance(a: Tokens, b: Tokens) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
