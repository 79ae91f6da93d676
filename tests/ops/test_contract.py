"""What every op asks of its input, and what torch asks of an operator: registration, fake tensors, compiled graphs."""

import pytest
import torch

from subquad import ops
from subquad.kernels import backends
from tests.ops.cases import CASES, Shape, cast

names = pytest.mark.parametrize("name", CASES)


def arguments(name, dtype=torch.float32, time=20):
    return list(cast(CASES[name], CASES[name].arguments(Shape(time=time), 0.5, 0), dtype))


def replaced(name, place, change):
    drawn = arguments(name)
    drawn[place] = change(drawn[place])
    return drawn


@names
@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, r"q must have 4 axes"),
        (1, lambda x: x[:, :3], ValueError, r"(share|one shape|must be|agree)"),
        (2, lambda x: x[:, :, ..., :0], ValueError, "empty"),
        (0, lambda x: x.long(), TypeError, "floating point"),
        (1, lambda x: x.bfloat16(), TypeError, "share dtype"),
        (2, lambda x: x.tolist(), TypeError, "must be a tensor"),
        (0, lambda x: x.to_sparse(), TypeError, "dense"),
        (1, lambda x: x.to("meta"), TypeError, "device"),
    ],
)
def test_wrong_tensors_get_a_sentence(name, place, change, error, message):
    with pytest.raises(error, match=message):
        CASES[name].op(*replaced(name, place, change))


@pytest.mark.parametrize("name", [n for n in CASES if n != "linear_attention"])
def test_wrong_gates_get_a_sentence(name):
    with pytest.raises(ValueError, match=r"(log_decay|beta|slope) must"):
        CASES[name].op(*replaced(name, 3, lambda x: x[..., :1, :] if x.ndim > 1 else x[:1]))
    with pytest.raises(TypeError, match="floating point"):
        CASES[name].op(*replaced(name, 3, lambda x: x.long()))


@names
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_values_out_of_range_are_refused(name, backend):
    for place in CASES[name].gates:
        drawn = arguments(name)
        is_slope, is_beta = drawn[place].ndim == 1, bool((drawn[place] > 0).any())
        drawn[place] = drawn[place] - 3 if is_slope else drawn[place] + 3
        expected = r"beta must lie in \[0, 2\]" if is_beta and not is_slope else "at most 0"
        with pytest.raises(ValueError, match=expected):
            CASES[name].op(*drawn, backend=backend)


@names
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
        ({"backend": "gpu"}, ValueError, "cannot run this call"),
        ({"chunk_size": 0}, ValueError, "between 1 and 1024"),
        ({"chunk_size": 1.5}, TypeError, "integer"),
        ({"scale": float("nan")}, ValueError, "finite"),
        ({"initial_state": torch.zeros(1, 1, 1, 1)}, ValueError, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0.0, 20.0])}, TypeError, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 20])}, ValueError, "batch of 1"),
    ],
)
def test_wrong_options_get_a_sentence(name, options, error, message):
    with pytest.raises(error, match=message):
        CASES[name].op(*arguments(name), **options)


@names
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("offsets", [[0, 5], [1, 20], [0, 12, 8, 20], [0, 21], [-1, 20]])
def test_offsets_must_rise_from_zero_to_the_end(name, backend, offsets):
    drawn = [x if x.ndim == 1 else x[:1] for x in arguments(name)]
    with pytest.raises(ValueError, match="cu_seqlens"):
        CASES[name].op(*drawn, cu_seqlens=torch.tensor(offsets), backend=backend)


def test_neighbouring_ops_name_each_other():
    q, k, v, gate = arguments("gla")
    with pytest.raises(ValueError, match="simple_gla"):
        ops.gla(q, k, v, gate[..., 0])
    with pytest.raises(ValueError, match="belongs to gla"):
        ops.simple_gla(q, k, v, gate)
    with pytest.raises(ValueError, match="linear_attention"):
        ops.gla(q, k, v)
    with pytest.raises(ValueError, match="kda"):
        ops.gated_delta_rule(q, k, v, gate, gate[..., 0].abs())


def test_environment_chooses_for_auto_only(monkeypatch):
    device, dtype = torch.device("cpu"), torch.float32
    monkeypatch.setenv("SUBQUAD_BACKEND", "chunked")
    assert backends.resolve("auto", device, dtype) == "chunked"
    assert backends.resolve("reference", device, dtype) == "reference"
    monkeypatch.delenv("SUBQUAD_BACKEND")
    assert backends.resolve("auto", device, torch.float64) == "chunked"
    with pytest.raises(ValueError, match="float64"):
        backends.resolve("cpu", device, torch.float64)


@names
def test_strides_do_not_matter(name):
    drawn = arguments(name)
    plain, _ = CASES[name].op(*drawn)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in drawn]
    torch.testing.assert_close(CASES[name].op(*strided)[0], plain)
    expanded = [x if x.ndim == 1 else x[:1].expand_as(x) for x in drawn]
    one = [x if x.ndim == 1 else x[:1] for x in drawn]
    torch.testing.assert_close(CASES[name].op(*expanded)[0][1:], CASES[name].op(*one)[0])


@names
def test_operator_passes_opcheck(name):
    """torch's own checks of schema, fake tensors and autograd registration."""
    from subquad.kernels.recurrence import dispatch

    drawn = arguments(name, time=9)
    case, seen = CASES[name], []
    operator = dispatch._OPERATORS["cpu"]
    try:
        dispatch._OPERATORS["cpu"] = lambda *args: seen.append(args) or operator(*args)
        case.op(*(x.requires_grad_() for x in drawn), backend="cpu")
    finally:
        dispatch._OPERATORS["cpu"] = operator
    detached = tuple(x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in seen[0])
    torch.library.opcheck(torch.ops.subquad.recurrence_cpu.default, detached)


@names
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_compiles_as_one_graph(name, backend):
    torch._dynamo.reset()
    case, drawn = CASES[name], arguments(name)

    def run(*tensors):
        output, state = case.op(*tensors, return_state=True, backend=backend)
        return output.sin().sum() + state.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in drawn]
        value = function(*leaves)
        value.backward()
        results.append([value, *(x.grad for x in leaves)])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)
