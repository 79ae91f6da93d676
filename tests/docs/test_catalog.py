"""The catalog says what is there: numbers, names, patterns, tests and claims of every row."""

import importlib.util
import re
from functools import cache

import pytest

from subquad import catalog
from subquad.catalog import ROWS, SYSTEMS, row_of
from subquad.layers.registry import load
from tests.docs.pages import ROOT

BUILT = [row for row in ROWS if row.state == "built"]
FLOORS = {"ops", "mixers", "feedforwards", "norms", "positions", "inference", "evaluation"}
built = pytest.mark.parametrize("row", BUILT, ids=lambda row: row.slug)


def public_names(row):
    return [name for names in row.names.values() for name in names]


@cache
def words_of_the_tests():
    files = [path for path in (ROOT / "tests").rglob("*.py") if "docs" not in path.relative_to(ROOT).parts]
    return set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in files)))


def test_seventy_numbered_rows():
    assert sorted(row.number for row in SYSTEMS) == list(range(1, 71))
    assert all(row.number is None for row in catalog.FOUNDATIONS)


def test_slugs_names_and_titles_are_unique():
    for values in ([row.slug for row in ROWS], [row.name for row in ROWS], [row.title for row in ROWS]):
        assert len(set(values)) == len(values)


def test_a_public_name_belongs_to_one_row_and_one_meaning_per_floor():
    for floor in FLOORS:
        names = [name for row in ROWS for name in row.names.get(floor, {})]
        assert len(set(names)) == len(names)
    owners = {}
    for row in ROWS:
        for name in public_names(row):
            assert owners.setdefault(name, row) is row, f"{name}: {owners[name].slug} and {row.slug}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_a_row_answers_to_its_names(row):
    for name in (row.slug, row.name, *public_names(row), *([row.number] if row.number else [])):
        assert row_of(str(name)) is row
    assert re.fullmatch("[a-z][a-z0-9_]*", row.slug)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_a_row_is_planned_without_names_or_built_with_them(row):
    assert row.state in ("planned", "built")
    if row.state == "planned":
        assert not row.names
        assert not row.patterns
        assert not row.backends
        assert row.claim is None
    else:
        assert public_names(row)
        assert set(row.names) <= FLOORS


@built
def test_names_import(row):
    for name, entry in ((name, entry) for names in row.names.values() for name, entry in names.items()):
        assert callable(load(entry.path)), name


@built
def test_patterns_are_those_of_the_mixers(row):
    classes = [load(entry.path) for entry in row.names.get("mixers", {}).values()]
    served = {pattern.removesuffix("-attention") for cls in classes for pattern in cls.patterns}
    if classes:
        assert set(row.patterns) == served
    known = {catalog.CAUSAL_SELF, catalog.FULL_SELF, catalog.CAUSAL_CROSS, catalog.FULL_CROSS, catalog.PREFIX_SELF}
    assert set(row.patterns) <= known
    assert len(set(row.patterns)) == len(row.patterns)


@built
def test_backends_are_named_in_order_of_the_library(row):
    assert [backend for backend in catalog.ALL_BACKENDS if backend in row.backends] == list(row.backends)


@built
def test_tests_mention_every_public_name(row):
    for names in row.names.values():
        for name, entry in names.items():
            assert {name, entry.path.partition(":")[2]} & words_of_the_tests(), f"no test mentions {name}"


@pytest.mark.parametrize("row", [row for row in BUILT if row.number], ids=lambda row: row.slug)
def test_a_built_system_has_a_claim(row):
    assert row.claim is not None
    assert importlib.util.find_spec(row.claim) is not None, f"{row.claim} is missing"
