"""The walk-through of CONTRIBUTING, carried out: its source, row and tests, as printed there."""

import inspect
import itertools
import sys
import types

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM, catalog, mixers
from tests.docs.pages import ROOT, blocks
from tests.mixers import test_contract as contract

SOURCE, ROW, TESTS = (
    "src/subquad/mixers/moving_average.py",
    "src/subquad/catalog.py",
    "tests/mixers/test_moving_average.py",
)
VALUES = {"seed": [0, 1], "name": ["moving_average"]}


@pytest.fixture
def added(monkeypatch):
    """The mixer as a module and a name of the catalog, for the length of a test."""
    printed = {block.title: block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.title}
    assert set(printed) == {SOURCE, ROW, TESTS}
    module = types.ModuleType("subquad.mixers.moving_average")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(printed[SOURCE], SOURCE, "exec"), vars(module))
    row = eval(compile(printed[ROW], ROW, "eval"), dict(vars(catalog)))
    for name, entry in row.names["mixers"].items():
        monkeypatch.setitem(catalog.MIXERS, name, entry)
    return row, printed


def test_its_own_tests_pass(added):
    namespace = {"__name__": "walk_through"}
    exec(compile(added[1][TESTS], TESTS, "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_it_keeps_the_contract_of_mixers(added):
    """Every test of the contract that is asked of all mixers."""
    carried_out = 0
    for name, test in vars(contract).items():
        parameters = inspect.signature(test).parameters if name.startswith("test_") else {}
        everyone = any(
            mark.args[0] == "name" and mark.args[1] in (contract.NAMES, contract.CAUSAL)
            for mark in getattr(test, "pytestmark", [])
        )
        if parameters and everyone:
            for values in itertools.product(*(VALUES[parameter] for parameter in parameters)):
                test(*values)
            carried_out += 1
    assert carried_out >= 9


def test_it_is_there_by_name_and_generates_after_saving(added, tmp_path):
    row, _ = added
    assert "moving_average" in mixers.available()
    served = {pattern.removesuffix("-attention") for pattern in mixers.mixer_class("moving_average").patterns}
    assert served == set(row.patterns)
    config = SubquadConfig(mixers="moving_average+softmax", vocab_size=40, hidden_size=32, num_hidden_layers=2)
    model, tokens = SubquadForCausalLM(config).eval(), torch.randint(0, 40, (1, 9))
    model.save_pretrained(tmp_path)
    loaded = SubquadForCausalLM.from_pretrained(tmp_path).eval()
    cached = loaded.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False))
