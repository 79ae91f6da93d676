"""Rules, verdicts, rendering and records, on made-up figures."""

import io
import json

import pytest
from rich.console import Console

from subquad import claims
from subquad.claims.contract import MARKDOWN_HEADER, Claim, Row, Term, at_least, at_most
from subquad.claims.experiment import Computed

LOSS = "loss"
OURS, BASELINE = Term("ours", LOSS), Term("baseline", LOSS)


class Clock:
    """An arm whose figures are times."""

    timed = True

    def measure(self, seed):
        return {"ms": 3.0}

    def tiny(self):
        return self


def claim(**fields):
    arms = {
        "ours": Computed(lambda seed: {LOSS: 1.0 + seed}),
        "baseline": Computed(lambda seed: {LOSS: 2.0}),
        "speed": Clock(),
    }
    rules = (at_most(OURS, BASELINE, plus=-0.5), at_most(Term("speed", "ms"), plus=5))
    given = {"number": 7, "slug": "toy", "claim": "A.", "measured": "B.", "arms": arms, "rules": rules}
    return Claim(**{**given, **fields})


def figures(ours, baseline, seed=0):
    return [Row("ours", seed, {LOSS: ours}), Row("baseline", seed, {LOSS: baseline})]


@pytest.mark.parametrize(
    ("rule", "ours", "baseline", "holds"),
    [
        (at_most(OURS, BASELINE, plus=-0.05), 1.95, 2.0, True),
        (at_most(OURS, BASELINE, plus=-0.05), 1.96, 2.0, False),
        (at_least(OURS, BASELINE, times=0.5), 1.0, 2.0, True),
        (at_least(OURS, BASELINE, times=0.5), 0.99, 2.0, False),
        (at_least(OURS, plus=0.9), 0.9, 0.0, True),
        (at_most(OURS, plus=0.9), float("nan"), 0.0, False),
        (at_least(OURS, BASELINE), float("nan"), 0.0, False),
    ],
)
def test_a_rule_holds_or_not(rule, ours, baseline, holds):
    assert rule.holds({"ours": {LOSS: ours}, "baseline": {LOSS: baseline}}) is holds


def test_rules_read_as_what_they_test():
    assert str(at_most(OURS, BASELINE, times=2, plus=-0.5)) == "ours's loss <= 2 x baseline's loss - 0.5"
    assert str(at_least(OURS, plus=0.9)) == "ours's loss >= 0.9"


def test_every_seed_must_hold_and_the_failing_one_is_named():
    rows = [*figures(1.0, 2.0, seed=0), *figures(1.8, 2.0, seed=1)]
    result = claim().judge(rows, seconds=1.0)
    assert not result.reproduced
    assert "not reproduced on seeds 0, 1" in result.verdict
    assert "seed 1: 1.8 against 1.5" in result.verdict
    assert claim().judge(rows[:2], seconds=1.0).reproduced


def test_a_nan_is_a_failure_that_is_named():
    rows = [*figures(1.0, 2.0, seed=0), *figures(float("nan"), 2.0, seed=1)]
    result = claim().judge(rows, seconds=1.0)
    assert not result.reproduced
    assert "seed 1: nan against" in result.verdict


def test_run_measures_every_arm_with_every_seed_and_reports_progress():
    lines = []
    result = claim().run((0, 1), lines.append)
    assert [(row.method, row.seed) for row in result.rows] == [
        (method, seed) for seed in (0, 1) for method in ("ours", "baseline", "speed")
    ]
    assert lines[0] == "07 toy: ours, seed 0"
    assert len(lines) == 6
    assert not result.reproduced  # seed 1: 2.0 against 1.5
    assert claim().run((0,)).reproduced


def test_without_times_their_rules_are_left_unjudged():
    result = claim().run((0,), timed=False)
    assert {row.method for row in result.rows} == {"ours", "baseline"}
    assert result.reproduced
    assert result.unjudged == ("speed's ms <= 5",)
    assert "not measured: speed's ms <= 5" in result.verdict
    only_times = claim(arms={"speed": Clock()}, rules=(at_most(Term("speed", "ms"), plus=5),))
    with pytest.raises(ValueError, match="nothing but time"):
        only_times.run((0,), timed=False)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_must_be_different(seeds):
    with pytest.raises(ValueError, match="seeds"):
        claim().run(seeds)


def test_a_rule_about_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="nobody"):
        claim(rules=(at_least(Term("nobody", LOSS), plus=0),))


def test_figures_that_decide_nothing_are_refused():
    with pytest.raises(ValueError, match="decide none"):
        claim().judge([Row("ours", 0, {LOSS: 1.0})], seconds=0.0)


def test_the_report_shows_claim_figures_rules_and_verdict():
    result = claim(remark="Mind the gap.").run((0, 1))
    stream = io.StringIO()
    Console(file=stream, width=150).print(result)
    shown = stream.getvalue()
    for part in ("Claim: A.", "seed 1", "ours", "FAILS (seed 1: 2 against 1.5)", "holds", "Not repro", "Mind the gap."):
        assert part in shown


def test_a_markdown_row_has_the_columns_of_the_header():
    result = claim(claim="x | y").run((0, 1))
    row = result.markdown_row()
    header = MARKDOWN_HEADER.splitlines()[0]
    assert row.replace("\\|", "").count("|") == header.count("|")
    assert "ours: loss 1 / 2" in row
    assert "**no**" in row


def test_records_are_kept_by_slug_and_read_back(tmp_path):
    path = tmp_path / "results" / "claims.json"
    claims.write_record(path, claim().run((0, 1)))
    claims.write_record(path, claim(number=3, slug="other").run((0, 2)))
    records = claims.read_records(path)
    assert list(records) == ["other", "toy"]  # by number
    assert records["toy"]["reproduced"] is False
    assert records["toy"]["rows"][0] == {"method": "ours", "seed": 0, "figures": {LOSS: 1.0}}
    assert [rule["holds"] for rule in records["toy"]["rules"]] == [False, True]
    assert list(path.parent.iterdir()) == [path]


def test_a_record_needs_two_seeds(tmp_path):
    with pytest.raises(ValueError, match="2 seeds"):
        claims.write_record(tmp_path / "claims.json", claim().run((0,)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"claims": 3}', '{"other": {}}'])
def test_a_file_of_another_kind_is_not_overwritten(tmp_path, text):
    path = tmp_path / "claims.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a file of recorded claims"):
        claims.write_record(path, claim().run((0, 1)))
    assert path.read_text() == text


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "claims.json"
    claims.write_record(path, claim().run((0, 1)))
    before = path.read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        claims.write_record(path, claim(slug="other").run((0, 1)))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_is_plain_json():
    record = claim().run((0, 1)).record()
    assert json.loads(json.dumps(record)) == record
