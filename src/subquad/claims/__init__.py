"""Every paper's claim as a small experiment against the paper's own baseline.

``available()`` lists them, ``run("gla")`` or ``run(6)`` measures one and judges it, ``run_claims(...)`` several. A
claim that does not reproduce at this size says so, with its figures.

Example:
    >>> load(64).slug
    'negative_eigenvalues'
"""

import difflib
import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from subquad.catalog import SYSTEMS, row_of
from subquad.claims.contract import MARKDOWN_HEADER, Claim, ClaimResult, Progress
from subquad.claims.records import read_records, write_record

__all__ = [
    "available",
    "load",
    "run",
    "run_claims",
    "read_records",
    "write_record",
    "Claim",
    "ClaimResult",
    "MARKDOWN_HEADER",
]


def available() -> list[str]:
    """The slugs of the claims that can be run, in the order of the papers' numbers."""
    return [row.slug for row in SYSTEMS if row.claim is not None]


def load(name: str | int) -> Claim:
    """The claim of a paper by its number, slug, or a name that the catalog knows it by.

    Raises:
        ValueError: there is no such paper, or no claim of it yet; the message names the nearest.
    """
    row = row_of(str(name))
    if row is None or row.claim is None:
        what = f"no claim is called {name!r}" if row is None else f"{row.name} has no claim to run yet"
        near = difflib.get_close_matches(str(name), available(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        numbers = ", ".join(f"{r.number:02d} {r.slug}" for r in SYSTEMS if r.claim is not None)
        raise ValueError(f"{what}{hint} There are: {numbers}")
    claim: Claim = importlib.import_module(row.claim).CLAIM
    return claim


def run(
    name: str | int, seeds: Sequence[int] = (0, 1), progress: Progress | None = None, *, timed: bool = True
) -> ClaimResult:
    """Runs the claim of a paper; see :meth:`Claim.run`."""
    return load(name).run(seeds, progress, timed=timed)


def run_claims(
    names: Iterable[str | int] | None = None,
    seeds: Sequence[int] = (0, 1),
    *,
    timed: bool = True,
    write: str | Path | None = None,
    progress: Progress | None = None,
    finished: Callable[[ClaimResult], None] | None = None,
) -> list[ClaimResult]:
    """Runs several claims one after the other, whether they reproduce or not.

    Args:
        names: as for :func:`load`; None: all.
        seeds, timed, progress: see :meth:`Claim.run`. With ``timed=False`` claims that are nothing but timings are
            left out.
        write: a JSON file that takes each result as soon as it is there (needs two seeds); see :func:`write_record`.
        finished: called with each result.
    """
    claims = [load(name) for name in (available() if names is None else names)]
    results = []
    for claim in claims:
        if not timed and all(arm.timed for arm in claim.arms.values()):
            continue
        result = claim.run(seeds, progress, timed=timed)
        if write is not None:
            write_record(write, result)
        if finished is not None:
            finished(result)
        results.append(result)
    return results
