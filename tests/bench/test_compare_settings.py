"""Settings, equal models and steps within a budget: everything that is decided before a worker starts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import SubquadConfig, SubquadForCausalLM, bench, tasks
from subquad.bench import CompareSettings, RecallSettings
from subquad.bench.comparison.candidates import matched_models, recall_model
from subquad.bench.comparison.schedule import StepTime, makespan, steps_within
from subquad.bench.comparison.settings import pattern_of

ALPHABET = b"abcdefgh \n"


def text(size=4000):
    letters = bytes(ALPHABET[(i * i + i // 7) % len(ALPHABET)] for i in range(size))
    return tasks.TextData.from_splits({"train": letters, "valid": letters[:800], "test": letters[:900]}, "letters")


def one(**changes):
    return CompareSettings(**{"mixers": ("softmax",), "context": 16, "tokens": 10_000, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"mixers": ("softmaxx",)}, ValueError, "unknown mixer 'softmaxx'; did you mean 'softmax'"),
        ({"mixers": "softmax"}, TypeError, "mixers must be a list of names; got 'softmax'"),
        ({"mixers": (1,)}, TypeError, "mixers must be a list of names; it holds 1"),
        ({"mixers": ()}, ValueError, "name at least one mixer"),
        ({"mixers": ("gla", "gla")}, ValueError, "gla stands in the list more than once"),
        ({"hybrids": ("gla*3+softmx",)}, ValueError, "unknown mixer 'softmx'"),
        ({"hybrids": ("gla*3",)}, ValueError, "a hybrid mixes at least two mixers"),
        ({"hybrids": ("gla**3",)}, ValueError, "reads like 'gla\\*3\\+softmax'"),
        ({"contexts": (512, 512)}, ValueError, "contexts must ascend"),
        ({"contexts": (1024, 512)}, ValueError, "contexts must ascend"),
        ({"contexts": ()}, ValueError, "contexts must hold at least one"),
        ({"contexts": (0,)}, ValueError, "contexts must be at least 1"),
        ({"seeds": (0, 0)}, ValueError, "seeds must differ"),
        ({"seeds": (-1,)}, ValueError, "seeds must be at least 0"),
        ({"seeds": 3}, TypeError, "seeds must be a list of numbers"),
        ({"budget": 0}, ValueError, "budget must be a finite number > 0"),
        ({"budget": float("nan")}, ValueError, "budget must be a finite number > 0"),
        ({"budget": "5m"}, TypeError, "budget must be a number"),
        ({"learning_rates": (float("inf"),)}, ValueError, "learning_rates must be a finite number"),
        ({"tokens": 5}, ValueError, "at least 4 steps of batch_size x context = 128; got 5"),
        ({"context": True}, TypeError, "context must be an integer"),
        ({"sweep_fraction": 1.5}, ValueError, r"sweep_fraction must lie in \(0, 1\]"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        one(**changes)


def test_settings_survive_json():
    for given_settings in (one(hybrids=("gla+softmax",)), one(recall=None), CompareSettings.demo()):
        plain = json.loads(json.dumps(given_settings.to_dict()))
        assert CompareSettings.from_dict(plain) == given_settings


def test_without_budget_and_tokens_there_is_a_budget():
    assert CompareSettings(mixers=("gla",)).budget == 300
    assert one().budget is None


@pytest.mark.parametrize(
    ("pattern", "entries"),
    [("gla", ["gla"]), ("gla*2+gla", ["gla"]), ("a*2+b", ["a", "a", "b"]), ("a+b+a+b", ["a", "b"])],
)
def test_a_pattern_is_its_shortest_repetition(pattern, entries):
    assert pattern_of(pattern) == entries


@pytest.mark.parametrize("parameters", [40_000, 127_000, 2_000_000])
def test_models_are_equal_within_two_percent(parameters):
    names = ("softmax", "gla", "delta_net", "retention", "gated_delta_net", "lightning")
    chosen = CompareSettings(mixers=names, hybrids=("gla*3+softmax",), parameters=parameters)
    models = matched_models(chosen, vocab_size=256)
    assert list(models) == [*names, "gla*3+softmax"]
    counts = [count for _, count in models.values()]
    assert max(counts) <= 1.02 * parameters
    assert min(counts) >= 0.98 * parameters
    shapes = {(fields["hidden_size"], fields["num_hidden_layers"]) for fields, _ in models.values()}
    assert len(shapes) == 1
    if parameters == 40_000:
        for fields, count in models.values():
            assert sum(p.numel() for p in SubquadForCausalLM(SubquadConfig(**fields)).parameters()) == count


def test_sizes_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match=r"retention cannot be made with 60,000 parameters: 2 layers of width 64 take"):
        matched_models(one(mixers=("retention",), parameters=60_000, hidden_size=64, layers=2), 256)
    with pytest.raises(ValueError, match=r"spans 4 layers; the models have 2"):
        matched_models(one(hybrids=("gla*3+softmax",), layers=2), 256)
    with pytest.raises(ValueError, match="softmax does not fit this model"):
        matched_models(one(hidden_size=64, heads=3), 256)


def test_the_recall_model_holds_a_whole_pattern():
    fields = recall_model("gla*3+softmax", RecallSettings())
    assert SubquadConfig(**fields).mixers == ["gla", "gla", "gla", "softmax"]


def test_a_text_shorter_than_a_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"letters is too short for a context of 2000: its valid split has 800"):
        bench.compare(text(), ["softmax"], context=2000, tokens=10**6, out=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


times = st.builds(StepTime, st.floats(1e-3, 1.0), st.floats(0, 2.0))


@settings(deadline=None)
@given(st.lists(times, min_size=1, max_size=8), st.integers(1, 4), st.floats(0.1, 500))
def test_steps_fill_the_time_and_no_more(all_times, workers, seconds):
    steps = steps_within(seconds, all_times, [1.0] * len(all_times), workers, most=10**6)
    ends = makespan([time.seconds(steps) for time in all_times], workers)
    later = makespan([time.seconds(steps + 1) for time in all_times], workers)
    assert steps == 0 or ends <= seconds
    assert steps == 10**6 or later > seconds
    assert makespan([1.0] * 6, 1) == 6 == 3 * makespan([1.0] * 6, 3)
