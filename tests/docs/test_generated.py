"""The tables of the documentation are those that the library gives now."""

import importlib.util

import pytest

from subquad import claims
from subquad.claims.contract import Row
from tests.docs.pages import PAGES, ROOT, name


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- table:" in p.read_text(encoding="utf-8")], ids=name)
def test_no_page_is_stale(generate, page):
    text = page.read_text(encoding="utf-8")
    assert generate.updated(text) == text, f"{name(page)} is stale: run python docs/generate.py and commit the result"


def test_every_table_has_a_page_and_every_page_is_reachable(generate):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for table in generate.TABLES:
        assert f"<!-- table: {table} -->" in text
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_claims_are_shown_as_recorded(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CLAIMS", tmp_path / "claims.json")
    assert "make claims" in generate.claims()
    claim = claims.load("gla")
    rows = [
        Row(method, seed, {term.measure: 1.0 for rule in claim.rules for term in (rule.left, rule.right) if term})
        for method in claim.arms
        for seed in (0, 1)
    ]
    claims.write_record(generate.CLAIMS, claim.judge(rows, 1.0))
    header, _, row = generate.claims().splitlines()
    assert header.startswith("| Paper")
    assert row.startswith("| 06 |")
    assert "**no**" in row
