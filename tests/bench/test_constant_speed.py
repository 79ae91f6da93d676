"""The measurement of speed against length, on steps whose cost is known: a clock of their own, never the machine's."""

import io

import pytest
import torch
from rich.console import Console

from subquad import SubquadConfig, SubquadForCausalLM, mixers
from subquad.bench.constant_speed import attention_preparation, constant_speed


class Machine:
    """Steps that take ``cost(batch, length)`` seconds of a clock that only they move."""

    def __init__(self, cost):
        self.now, self.cost, self.calls = 0.0, cost, []

    def clock(self):
        return self.now

    def prepare(self, batch, length):
        def step():
            self.calls.append(length)
            self.now += self.cost(batch, length)

        return step


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_known_cost_is_recovered(power):
    machine = Machine(lambda batch, length: 3e-6 * batch * length * length**power)
    speeds = constant_speed(machine.prepare, [512, 1024, 2048, 8192], tokens=8192, memory=False, clock=machine.clock)
    assert speeds.exponent == pytest.approx(power, abs=1e-6)
    assert [row.batch for row in speeds.rows] == [16, 8, 4, 1]
    assert speeds.rows[0].tokens_per_second == pytest.approx(1 / (3e-6 * 512**power))


def test_with_a_row_of_each_length_the_exponent_is_the_same():
    machine = Machine(lambda batch, length: 1e-6 * length * length**0.7)
    speeds = constant_speed(machine.prepare, [64, 256, 1024], memory=False, clock=machine.clock)
    assert speeds.exponent == pytest.approx(0.7, abs=1e-6)
    assert [row.batch for row in speeds.rows] == [1, 1, 1]


def test_the_first_call_does_not_count_and_a_disturbance_does_not_show():
    seen = {}

    def cost(batch, length):
        seen[length] = seen.get(length, 0) + 1
        return {1: 100.0, 3: 50.0}.get(seen[length], 1.0)  # compilation, then a disturbance

    machine = Machine(cost)
    speeds = constant_speed(machine.prepare, [8, 16], repeats=5, memory=False, clock=machine.clock)
    assert [row.seconds for row in speeds.rows] == [1.0, 1.0]
    assert machine.calls == [8, 16] * 6  # lengths take turns


def test_a_mixer_and_a_model_are_measured_forward_and_backward():
    mixer = mixers.build("lightning", 16, num_heads=2)
    model = SubquadForCausalLM(SubquadConfig(mixers="gla", hidden_size=16, num_hidden_layers=1, vocab_size=32))
    for subject in (mixer, model):
        speeds = constant_speed(subject, [8, 16], tokens=16, repeats=1)
        assert all(row.seconds > 0 and row.bytes_per_token > 0 for row in speeds.rows)
        assert all(parameter.grad is None for parameter in subject.parameters())
        forward = constant_speed(subject, [8, 16], tokens=16, repeats=1, backward=False)
        assert all(one.bytes_per_token < two.bytes_per_token for one, two in zip(forward.rows, speeds.rows))


def test_memory_is_what_a_step_holds_at_once():
    def prepare(batch, length):
        def step():
            for _ in range(3):  # one after the other: never two at once
                block = torch.ones(length, 1000)
                del block

        return step

    speeds = constant_speed(prepare, [10, 20], repeats=1)
    for row in speeds.rows:
        assert 4000 <= row.bytes_per_token < 4000 * 1.2 + 20_000 / row.length


def test_the_peer_is_torch_s_causal_attention():
    step = attention_preparation(2, 4, True, 0)(1, 6)
    step()
    with torch.autograd.profiler.profile() as profiler:
        step()
    assert any("scaled_dot_product" in event.key for event in profiler.key_averages())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [8]}, "two or more"),
        ({"lengths": [8, 8]}, "two or more"),
        ({"lengths": [0, 8]}, "two or more"),
        ({"lengths": [8, 24], "tokens": 32}, "32 is not one of 24"),
        ({"lengths": [8, 16], "repeats": 0}, "repeats"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        constant_speed(Machine(lambda batch, length: 1.0).prepare, **arguments)


def test_a_subject_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        constant_speed(torch.nn.Linear(2, 2), [8, 16])


def test_the_table_shows_every_length():
    machine = Machine(lambda batch, length: 1e-3)
    speeds = constant_speed(machine.prepare, [1024, 2048], memory=False, clock=machine.clock)
    stream = io.StringIO()
    Console(file=stream, width=100).print(speeds.table())
    for part in ("1,024", "2,048", "1.00", "1,024,000", "length^-1.00"):
        assert part in stream.getvalue()
