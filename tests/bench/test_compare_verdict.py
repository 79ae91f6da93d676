"""What is said of given figures: the words, the table, the report; nothing is trained here."""

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from subquad.bench import CompareSettings
from subquad.bench.comparison.results import CandidateResult, Comparison
from subquad.bench.comparison.verdict import verdict_of
from subquad.bench.report.page import table_of, write_report
from subquad.mixers import available


def candidate(name, losses, *, read=(1000.0, 1010.0), state=(100, 100), recall=(0.5, 0.5), far=None, rate=3e-3):
    """A candidate with these test losses (None: diverged), the same reading speed at 512 and 1024 tokens."""
    runs = []
    for seed, loss in enumerate(losses):
        bits = None if loss is None else [loss] * 4 + [loss if far is None else far] * 12
        runs.append(
            {
                "seed": seed,
                "diverged": None if loss is not None else "the loss is nan",
                "test_bits": loss,
                "positions": bits and {"multiple": 4, "block": 128, "bits": bits},
                "curve": [] if loss is None else [[10, loss + 1], [20, loss]],
                "step_seconds": 0.1,
            }
        )
    speed = [
        {
            "length": length,
            "prefill_seconds": [length / speed for speed in read],
            "decode_seconds": [0.001],
            "state_bytes": kept,
        }
        for length, kept in zip((512, 1024), state)
    ]
    raw = {
        "learning_rate": rate,
        "sweep": [],
        "runs": runs,
        "recall_learning_rate": 3e-3,
        "recall": [{"learning_rate": 3e-3, "seed": i, "accuracy": each} for i, each in enumerate(recall)],
        "speed": {"costs": speed, "left_out": []},
        "memory": {"contexts": [512, 1024], "bytes": [10_000, 20_000], "reason": None},
    }
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CandidateResult(name, fields, 127_000, raw, 512, 8)


def comparison(*candidates, bigram=3.5, folder=None):
    mixers = tuple(c.name for c in candidates if "+" not in c.name)
    hybrids = tuple(c.name for c in candidates if "+" in c.name)
    seeds = tuple(range(len(candidates[0].raw["runs"])))
    return Comparison(
        settings=CompareSettings(mixers=mixers, hybrids=hybrids, contexts=(512, 1024), seeds=seeds, parameters=127_000),
        data={
            "source": "letters <b>",
            "split_by": "given",
            "tokens": {"train": 1, "valid": 1, "test": 1},
            "bigram_bits": bigram,
        },
        steps=20,
        sweep_steps=7,
        recall_steps=5,
        workers=2,
        machine={
            "processor": "p",
            "cores": 2,
            "memory_bytes": None,
            "system": "s",
            "blas": [],
            "gpu": None,
            "backend": "auto",
        },
        versions={"python": "3"},
        seconds=12.0,
        candidates=list(candidates),
        notes=["A note."],
        folder=folder,
    )


def said(*candidates, **how):
    return "\n".join(map(str, verdict_of(comparison(*candidates, **how))))


def test_ranges_that_overlap_read_no_difference():
    words = said(candidate("gla", [2.80, 2.90]), candidate("softmax", [2.85, 2.95]))
    assert "gla has the lowest loss on held-out text: 2.850 (2.800 to 2.900)" in words
    assert "Between it and softmax there is no difference" in words
    assert "Behind it" not in words


def test_ranges_apart_are_told_with_their_distance():
    words = said(candidate("gla", [2.80, 2.90]), candidate("softmax", [2.95, 3.05]))
    assert "softmax by 0.150" in words
    assert "no difference" not in words
    assert "If loss decides, gla serves this text best" in words


def test_one_seed_tells_no_difference_from_chance():
    words = said(candidate("gla", [2.0]), candidate("softmax", [3.0]))
    assert "cannot be told from chance" in words
    assert "Behind it" not in words


@pytest.mark.parametrize(("losses", "below"), [([3.4, 3.45], True), ([3.4, 3.5], False), ([3.6, 3.7], False)])
def test_the_table_of_pairs_is_a_bar_for_every_seed(losses, below):
    words = said(candidate("gla", losses))
    assert ("All are below the 3.500" in words) is below
    assert ("Not below the 3.500 bits per byte of a table of byte pairs on every seed: gla" in words) is not below


def test_tokens_of_a_tokenizer_have_no_such_bar():
    assert "table of byte pairs" not in said(candidate("gla", [2.0, 2.1]), bigram=None)


def test_the_faster_of_equal_losses_serves():
    words = said(
        candidate("gla", [2.8, 2.9], read=(2000.0, 2020.0)), candidate("softmax", [2.8, 2.9], read=(1000.0, 1010.0))
    )
    assert "at 512 to 1k tokens gla reads fastest (2.0 times softmax at 1k)" in words
    same = said(candidate("gla", [2.8, 2.9]), candidate("softmax", [2.8, 2.9]))
    assert "gla and softmax read fastest, not told apart by their timings" in same


def test_speed_that_costs_loss_is_told_with_its_price():
    words = said(candidate("softmax", [2.5, 2.6]), candidate("gla", [2.9, 3.0], read=(3000.0, 3030.0)))
    assert "At 1k tokens gla reads 3.0 times as fast, for 0.400 bits per byte more." in words


def test_a_growing_state_is_told_from_a_constant_one():
    words = said(candidate("gla", [2.8, 2.9], state=(4096, 4096)), candidate("softmax", [2.8, 2.9], state=(512, 1024)))
    assert "does not grow with the context while writing: gla 4.00 KiB" in words
    assert "a growing memory holds: softmax 1.00 KiB" in words


def test_recall_that_overlaps_is_not_told_apart():
    words = said(candidate("gla", [2.8, 2.9], recall=(0.4, 0.6)), candidate("softmax", [2.8, 2.9], recall=(0.55, 0.95)))
    assert "softmax 75% and gla 50%. Not told apart from softmax: gla." in words


def test_loss_that_rises_beyond_the_context_is_told():
    words = said(candidate("gla", [2.8, 2.9]), candidate("softmax", [2.8, 2.9], far=4.85))
    assert "gla keeps the loss; softmax (by 2.00 bits per byte) gets worse" in words


def test_a_diverged_training_is_told_and_never_ranked():
    words = said(candidate("gla", [2.8, 2.9]), candidate("softmax", [None, None]))
    assert "softmax diverged in training (seed 0: the loss is nan" in words
    assert "softmax has" not in words
    assert "every training diverged" in said(candidate("gla", [None, None]))


def test_a_rate_at_the_edge_is_told():
    assert "best learning rate of gla was the smallest or largest tried" in said(candidate("gla", [2, 3], rate=1e-2))
    assert "smallest or largest" not in said(candidate("gla", [2, 3], rate=3e-3))


def test_twelve_mixers_fit_a_terminal_of_80_columns():
    names = [*available()[:11], "gated_delta_net*3+softmax"]
    many = comparison(*(candidate(name, [2.8, 2.9], state=(2**20, 2**24)) for name in names))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(many.table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    assert "…" not in shown
    assert shown.count("2.850") == len(names)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.pictures, self.references, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.pictures.append(values)
        self.headings.append(tag)


def test_the_report_needs_nothing_beside_it(tmp_path):
    found = comparison(candidate("gla", [2.8, 2.9]), candidate("softmax", [None, None]), folder=tmp_path)
    write_report(found.with_verdict(verdict_of(found)))
    html = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert len(page.pictures) == len(list((tmp_path / "plots").glob("*.svg"))) == 8
    assert all(picture["alt"] and picture["src"].startswith("data:image/svg+xml") for picture in page.pictures)
    assert not [reference for reference in page.references if not reference.startswith("data:")]
    assert not re.search(r"url\(|@import|<script", html)
    assert "letters &lt;b&gt;" in html
    assert "gla has the lowest" in html or "gla reaches 2.850" in html
    assert "nan" not in re.sub(r"data:[^\"]*", "", html).replace("the loss is nan", "")
    assert not list(tmp_path.rglob(".writing-*"))


def test_the_best_of_a_column_and_its_equals_are_marked():
    found = comparison(
        candidate("gla", [2.8, 2.9]), candidate("softmax", [2.85, 2.95]), candidate("lightning", [3, 3.1])
    )
    table = table_of(found)
    loss = [(row["mixer"], row["cells"][0]["best"], row["cells"][0]["spread"]) for row in table["rows"]]
    assert loss == [
        ("gla", True, "2.800 to 2.900"),
        ("softmax", True, "2.850 to 2.950"),
        ("lightning", False, "3.000 to 3.100"),
    ]
