"""The recorded verdicts: each follows from its own figures, and the cheapest experiment still gives its verdict.

``SUBQUAD_CLAIMS`` names the claim to measure instead; ``SUBQUAD_CLAIMS=1`` takes one by the hash of the git tree, so
that different commits measure different claims.
"""

import os
import subprocess
from pathlib import Path

import pytest

from subquad import claims
from subquad.claims.contract import Row

ROOT = Path(__file__).parents[2]
RECORDS = claims.read_records(ROOT / "benchmarks" / "results" / "claims.json")
CHEAPEST = "negative_eigenvalues"


def measured():
    asked = os.environ.get("SUBQUAD_CLAIMS")
    if not asked:
        return CHEAPEST
    if asked != "1":
        return claims.load(asked).slug
    found = subprocess.run(["git", "rev-parse", "HEAD^{tree}"], cwd=ROOT, capture_output=True, text=True, check=True)
    trained = [slug for slug in RECORDS if not all(arm.timed for arm in claims.load(slug).arms.values())]
    return trained[int(found.stdout.strip(), 16) % len(trained)]


def rows_of(slug):
    return [Row(row["method"], row["seed"], row["figures"]) for row in RECORDS[slug]["rows"]]


@pytest.mark.parametrize("slug", sorted(RECORDS))
def test_a_recorded_verdict_follows_from_its_figures(slug):
    record = RECORDS[slug]
    result = claims.load(slug).judge(rows_of(slug), record["seconds"])
    assert len(result.seeds) >= 2
    assert {outcome.rule: outcome.holds for outcome in result.outcomes} == {
        rule["rule"]: rule["holds"] for rule in record["rules"]
    }
    assert result.reproduced == record["reproduced"]
    assert {row["method"] for row in record["rows"]} <= set(claims.load(slug).arms)


def test_a_measured_claim_gives_its_recorded_verdict():
    """On its first seed; that every seed agrees is what the record says."""
    slug = measured()
    claim, first = claims.load(slug), RECORDS[slug]["rows"][0]["seed"]
    recorded = claim.judge([row for row in rows_of(slug) if row.seed == first], 0.0)
    holds = {outcome.rule: outcome.holds for outcome in recorded.outcomes}
    result = claim.run([first], timed=False)
    changed = [str(outcome) for outcome in result.outcomes if outcome.holds != holds[outcome.rule]]
    assert not changed, f"claim {slug} no longer gives its recorded verdict: {'; '.join(changed)}"
