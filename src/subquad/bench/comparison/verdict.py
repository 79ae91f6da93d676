"""From figures to plain words: which mixer serves this text at which length, why, and how sure that is.

Two candidates differ where the ranges of their measurements do not overlap, each measured at least twice. Everything
else reads "no difference". Nothing is said of lengths, sizes or texts that were not measured.
"""

from collections.abc import Iterable
from itertools import groupby

from subquad.bench.comparison.results import CandidateResult, Comparison, ContextFigures, Statement
from subquad.evaluation.report import Range, bytes_text, count_text, length_text, listed

MOST_NAMED = 5  # in one sentence


def verdict_of(comparison: Comparison) -> list[Statement]:
    """What follows from the figures, the most important first."""
    ranked = comparison.by_loss()
    if not ranked:
        return [Statement("Loss", "No model could be trained: every training diverged. Try smaller learning rates.")]
    leaders = leading(comparison)
    topics = (
        ("Loss", [_loss_sentence(comparison, ranked, leaders), *_below_bigram(comparison, ranked)]),
        ("Which one at which length", _serving(comparison, leaders) + _others_faster(comparison, leaders)),
        ("Memory while writing", _state(comparison)),
        ("Recall", _recall(comparison)),
        ("Beyond the training context", _beyond_context(comparison, ranked)),
        ("Keep in mind", _cautions(comparison)),
    )
    return [Statement(topic, " ".join(sentences)) for topic, sentences in topics if sentences]


def leading(comparison: Comparison) -> list[CandidateResult]:
    """The candidate of the lowest loss, and those that cannot be told from it."""
    ranked = comparison.by_loss()
    best = _loss(ranked[0])
    return [candidate for candidate in ranked if not _loss(candidate).differs_from(best)]


def fastest_reader(candidates: list[CandidateResult], length: int) -> list[CandidateResult]:
    """Of those measured at this length, the one that reads fastest and those whose range overlaps its."""
    measured = [c for c in candidates if _at(c, length) is not None]
    if not measured:
        return []
    best = max(measured, key=lambda c: _figures(c, length).prefill.mean)
    return [
        best,
        *(
            c
            for c in measured
            if c is not best and _figures(c, length).prefill.overlaps(_figures(best, length).prefill)
        ),
    ]


def _loss_sentence(comparison: Comparison, ranked: list[CandidateResult], leaders: list[CandidateResult]) -> str:
    best = ranked[0]
    after = f"After {count_text(comparison.tokens)} training tokens"
    lowest = f"{best.name} has the lowest loss on held-out text: {_loss(best).text(3)} bits per byte"
    if len(ranked) == 1:
        return f"{after}, {best.name} reaches {_loss(best).text(3)} bits per byte on held-out text."
    if _loss(best).count < 2:
        return f"{after}, {lowest}. There is one seed only, so that a difference cannot be told from chance."
    others = [c for c in leaders if c is not best]
    behind = [c for c in ranked if c not in leaders]
    parts = [f"{after}, {lowest} over {_loss(best).count} seeds."]
    if others:
        parts.append(f"Between it and {_named(c.name for c in others)} there is no difference: the seeds overlap.")
    if behind:
        gaps = _named(f"{c.name} by {_loss(c).mean - _loss(best).mean:.3f}" for c in behind)
        parts.append(f"Behind it, by more than the seeds spread: {gaps}.")
    return " ".join(parts)


def _below_bigram(comparison: Comparison, ranked: list[CandidateResult]) -> list[str]:
    bar = comparison.data["bigram_bits"]
    if bar is None:
        return []
    above = [c.name for c in ranked if _loss(c).high >= bar]
    if not above:
        return [
            f"All are below the {bar:.3f} bits per byte of a table of byte pairs: they have learnt more than pairs."
        ]
    return [
        f"Not below the {bar:.3f} bits per byte of a table of byte pairs on every seed: {_named(above)}. This training "
        "has taught them less than counting pairs does; judge by a longer one."
    ]


def _serving(comparison: Comparison, leaders: list[CandidateResult]) -> list[str]:
    """For each length: of the candidates that none beats in loss, the one that reads fastest."""
    lengths = [n for n in comparison.settings.contexts if any(_at(c, n) for c in leaders)]
    if not lengths:
        return []
    if len(leaders) == 1:
        only = leaders[0].name
        return [
            f"If loss decides, {only} serves this text best: no other matches it. It was measured at {_span(lengths)} "
            "tokens."
        ]
    chosen = [(n, tuple(c.name for c in fastest_reader(leaders, n))) for n in lengths]
    parts = []
    for names, group in groupby(chosen, key=lambda pair: pair[1]):
        part = [n for n, _ in group]
        how = "reads fastest" if len(names) == 1 else "read fastest, not told apart by their timings"
        parts.append(f"at {_span(part)} tokens {_named(names)} {how}{_speed_ratio(leaders, names, part[-1])}")
    return [f"Of those with the lowest loss, {'; '.join(parts)}."]


def _speed_ratio(candidates: list[CandidateResult], names: tuple[str, ...], length: int) -> str:
    rest = [c for c in candidates if c.name not in names and _at(c, length) is not None]
    if not rest:
        return ""
    best = max(_figures(c, length).prefill.mean for c in candidates if c.name in names)
    slowest = min(rest, key=lambda c: _figures(c, length).prefill.mean)
    return f" ({best / _figures(slowest, length).prefill.mean:.1f} times {slowest.name} at {length_text(length)})"


def _others_faster(comparison: Comparison, leaders: list[CandidateResult]) -> list[str]:
    """What a higher loss would buy at the longest context."""
    length = comparison.longest_common_context()
    if length is None:
        return []
    fastest = fastest_reader(comparison.candidates, length)
    if any(c in leaders for c in fastest):
        return []
    own = max(_figures(c, length).prefill.mean for c in leaders)
    quick = fastest[0]
    ratio = _figures(quick, length).prefill.mean / own
    price = "" if quick.loss is None else f", for {quick.loss.mean - _loss(leaders[0]).mean:.3f} bits per byte more"
    return [f"At {length_text(length)} tokens {quick.name} reads {ratio:.1f} times as fast{price}."]


def _state(comparison: Comparison) -> list[str]:
    """Which candidates hold a state that grows, and what a written token costs at the longest context."""
    length = comparison.longest_common_context()
    if length is None or comparison.settings.contexts[0] == length:
        return []
    first = next(n for n in comparison.settings.contexts if all(_at(c, n) for c in comparison.candidates))
    grows: list[tuple[str, ContextFigures]] = []
    stays: list[tuple[str, ContextFigures]] = []
    for candidate in comparison.candidates:
        early, late = _figures(candidate, first), _figures(candidate, length)
        (grows if late.state_bytes > early.state_bytes else stays).append((candidate.name, late))
    sentences = []
    if stays:
        stays.sort(key=lambda pair: pair[1].state_bytes)
        sizes = _named(f"{name} {bytes_text(at.state_bytes)}" for name, at in stays)
        sentences.append(f"Memory that does not grow with the context while writing: {sizes}.")
    if grows:
        grows.sort(key=lambda pair: pair[1].state_bytes)
        sizes = _named(f"{name} {bytes_text(at.state_bytes)}" for name, at in grows)
        sentences.append(f"At {length_text(length)} tokens a growing memory holds: {sizes}.")
    return sentences


def _recall(comparison: Comparison) -> list[str]:
    measured = [(c.name, c.recall) for c in comparison.candidates if c.recall is not None]
    recall = comparison.settings.recall
    if not measured or recall is None:
        return []
    measured.sort(key=lambda pair: -pair[1].mean)
    figures = _named(f"{name} {100 * found.mean:.0f}%" for name, found in measured)
    best = measured[0][1]
    same = [name for name, found in measured[1:] if not found.differs_from(best)]
    told = f" Not told apart from {measured[0][0]}: {_named(same)}." if same else ""
    return [
        f"Finding {recall.num_pairs} stored pairs again, after {comparison.recall_steps} steps of a small model: "
        f"{figures}.{told} A longer training may change these figures."
    ]


def _beyond_context(comparison: Comparison, ranked: list[CandidateResult]) -> list[str]:
    """Who keeps its loss beyond the length it was trained at."""
    multiples = [multiple for multiple in ranked[0].extrapolation if multiple > 1]
    if not multiples:
        return ["Loss beyond the training context was not measured: the held-out text is too short."]
    far, context = multiples[-1], comparison.settings.context
    keeps: list[tuple[str, float]] = []
    loses: list[tuple[str, float]] = []
    for candidate in ranked:
        near, beyond = candidate.extrapolation[1], candidate.extrapolation[far]
        rise = beyond.mean - near.mean
        (loses if beyond.low > near.high and rise > 0.02 else keeps).append((candidate.name, rise))
    where = f"from {length_text(context * far // 2)} to {length_text(context * far)} tokens"
    parts = []
    if keeps:
        parts.append(f"{_named(name for name, _ in keeps)} keep{'s' if len(keeps) == 1 else ''} the loss")
    if loses:
        worse = _named(f"{name} (by {rise:.2f} bits per byte)" for name, rise in loses)
        parts.append(f"{worse} get{'s' if len(loses) == 1 else ''} worse")
    return [f"Trained on rows of {length_text(context)} tokens and read on, {where}: {'; '.join(parts)}."]


def _cautions(comparison: Comparison) -> list[str]:
    sentences = []
    for candidate in comparison.candidates:
        if candidate.diverged:
            sentences.append(f"{candidate.name} diverged in training ({'; '.join(candidate.diverged)}).")
    rates = comparison.settings.learning_rates
    edge = [c.name for c in comparison.candidates if len(rates) > 1 and c.learning_rate in (rates[0], rates[-1])]
    if edge:
        sentences.append(
            f"The best learning rate of {_named(edge)} was the smallest or largest tried: a wider choice may lower "
            "the loss."
        )
    sentences.append(
        f"This holds for models of {count_text(comparison.settings.parameters)} parameters trained on "
        f"{count_text(comparison.tokens)} tokens of this text; larger models and longer trainings were not measured."
    )
    return sentences


def _named(items: Iterable[str]) -> str:
    """The items in a row; of many the first ones and how many more, which the table shows."""
    items = list(items)
    if len(items) <= MOST_NAMED + 2:
        return listed(items)
    return listed([*items[:MOST_NAMED], f"{len(items) - MOST_NAMED} others"])


def _loss(candidate: CandidateResult) -> Range:
    assert candidate.loss is not None
    return candidate.loss


def _at(candidate: CandidateResult, length: int) -> ContextFigures | None:
    return next((figures for figures in candidate.contexts if figures.length == length), None)


def _figures(candidate: CandidateResult, length: int) -> ContextFigures:
    found = _at(candidate, length)
    assert found is not None
    return found


def _span(lengths: list[int]) -> str:
    if len(lengths) == 1:
        return length_text(lengths[0])
    return f"{length_text(lengths[0])} to {length_text(lengths[-1])}"
