"""Ops, feature maps and mixers held against flash-linear-attention's own naive functions and layers.

Outputs and gradients, within 1e-4 of the largest value of each tensor: its naive functions compute in float32.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from subquad import mixers, ops
from subquad.layers.feature_attention import DPFP, T2R, Hedgehog
from subquad.ops.lightning.api import retention_slopes

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"

pytestmark = pytest.mark.skipif(
    not (PEERS / "fla").is_dir(), reason="flash-linear-attention is not in .peers (make peers)"
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What the other library found, as ``fla_functions`` wrote it."""
    path = tmp_path_factory.mktemp("fla") / "recorded.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.peers.fla_functions", str(path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(path)


def bounded_memory(q, k, v, slots):
    """ABC in our words: two additive attentions, the first read slot by slot."""
    unit = torch.eye(slots.shape[-1], dtype=q.dtype)
    memories = [ops.additive_attention(one.expand_as(slots), slots, k)[0] for one in unit]
    weights = torch.einsum("bthk,mbthk->bthm", q, torch.stack(memories)) * q.shape[-1] ** -0.5
    return ops.additive_attention(weights.softmax(-1), slots, v)[0]


def retention(q, k, v):
    return ops.lightning_attention(q, k, v, retention_slopes(q.shape[2]).to(q.dtype), scale=q.shape[-1] ** -0.5)[0]


def negative_eigenvalues(q, unit_k, v, beta, log_decay):
    keys = unit_k.repeat_interleave(2, 1).roll(1, 1).unflatten(1, (-1, 2))
    values, strengths = (x.repeat_interleave(2, 1).unflatten(1, (-1, 2)) for x in (v, 2 * beta))
    return ops.delta_product(q, keys, values, strengths, log_decay, scale=1.0)[0]


FUNCTIONS = {
    "based": lambda q, k, v: ops.taylor_linear_attention(q, k, v, eps=1e-6)[0],
    "linear_attention": lambda positive_q, positive_k, v: ops.linear_attention(
        positive_q * positive_q.shape[-1] ** -0.5, positive_k, v, normalize=True, eps=1e-10
    )[0],
    "linear_attention_from_a_state": lambda q, k, v, state: ops.linear_attention(q, k, v, initial_state=state)[0],
    "bounded_memory": bounded_memory,
    "gated_linear_attention": lambda q, k, v, log_decay_of_channels, state: ops.gla(
        q, k, v, log_decay_of_channels, initial_state=state
    )[0],
    "simple_gated_linear_attention": lambda q, k, v, log_decay, state: ops.simple_gla(
        q, k, v, log_decay, initial_state=state
    )[0],
    "retention": retention,
    "delta_rule": lambda q, unit_k, v, beta, state: ops.delta_rule(
        q, unit_k, v, beta, scale=q.shape[-1] ** -0.5, initial_state=state
    )[0],
    "gated_delta_rule": lambda q, unit_k, v, beta, log_decay, state: ops.gated_delta_rule(
        q, unit_k, v, log_decay, beta, initial_state=state
    )[0],
    "kimi_delta_attention": lambda q, unit_k, v, log_decay_of_channels, beta, state: ops.kda(
        q, unit_k, v, log_decay_of_channels, beta, initial_state=state
    )[0],
    "negative_eigenvalues": negative_eigenvalues,
}


def taylor_linear(causal):
    return mixers.build("taylor_linear", 32, num_heads=4, feature_dim=4, causal=causal, output_norm="none")


def lightnet():
    """Their outputs are divided by the root of the key width before the norm, whose 1e-6 is so many times ours."""
    return mixers.build("lightnet", 32, num_heads=4, expand_ratio=6, gate_rank=5, norm_eps=6e-6)


def mom(shared, single):
    return mixers.build("mom", 32, num_heads=4, shared=shared, single_kv=single, expand_v=2)


def memory_names(single):
    """Their shared memory is the last of ours; with one projection for all, it is the only one."""
    last = "0" if single else "4"
    names = {f"{part}_proj.{e}.weight": f"memories.{e}.{part}_proj.weight" for part in "kvba" for e in range(4)}
    names |= {f"shared_{part}.weight": f"memories.{last}.{part}_proj.weight" for part in "kvba"}
    names |= {f"{part}_conv1d.weight": f"convolutions.{part}.weight" for part in "qkv"}
    return names | {"gate.weight": "router.weight", "A_log": "decay.A_log", "dt_bias": "decay.dt_bias"}


LAYERS = {
    "based_layer": (partial(taylor_linear, True), {}),
    "based_layer_over_all_tokens": (partial(taylor_linear, False), {}),
    "lightnet_layer": (lightnet, {"g_norm.weight": "o_norm.weight"}),
    "memories_layer": (partial(mom, True, False), memory_names(False)),
    "memories_layer_alone": (partial(mom, False, False), memory_names(False)),
    "memories_layer_single": (partial(mom, True, True), memory_names(True)),
}


def of_case(recorded, name, part):
    prefix = f"{name}/{part}/"
    return {key.removeprefix(prefix): x for key, x in recorded.items() if key.startswith(prefix)}


def assert_equal(ours, theirs, what):
    largest = theirs.abs().max()
    assert largest > 0, f"{what}: nothing to compare"
    error = (ours.to(theirs.dtype) - theirs).abs().max()
    assert error <= 1e-4 * largest, f"{what}: off by {error / largest:.1e} of the largest value"


def compare(recorded, name, output, operands):
    (output * recorded[f"{name}/weight"]).sum().backward()
    assert_equal(output, recorded[f"{name}/output"], f"{name}, output")
    for key, gradient in of_case(recorded, name, "gradients").items():
        assert_equal(operands[key].grad.reshape(gradient.shape), gradient, f"{name}, gradient of {key}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_equal_its_naive_functions(name, recorded):
    operands = {key: x.requires_grad_() for key, x in of_case(recorded, name, "operands").items()}
    compare(recorded, name, FUNCTIONS[name](**operands), operands)


@pytest.mark.parametrize("name", LAYERS)
def test_mixers_equal_its_layers(name, recorded):
    build, names = LAYERS[name]
    mixer, operands = build().eval(), of_case(recorded, name, "operands")
    x = operands.pop("x").requires_grad_()
    own = {key: names.get(key, key) for key in operands}
    shapes = {key: p.shape for key, p in mixer.named_parameters()}
    mixer.load_state_dict({own[key]: p.reshape(shapes[own[key]]) for key, p in operands.items()})
    output = mixer(x).output
    parameters = dict(mixer.named_parameters())
    compare(recorded, name, output, {"x": x, **{key: parameters[own[key]] for key in operands}})


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("hedgehog_features", lambda heads, width: Hedgehog(heads, width, form="joint", shared=True)),
        ("t2r_features", lambda heads, width: T2R(heads, width, shared=True)),
        ("dpfp_features", DPFP),
    ],
)
def test_feature_maps_equal_its_modules(name, build, recorded):
    """Ours have weights for each head, theirs one for all: the same in every head, whose gradients add up."""
    operands = of_case(recorded, name, "operands")
    x = operands.pop("x").requires_grad_()
    phi = build(*x.shape[2:]).double()
    for key, theirs in operands.items():
        ours = getattr(phi.q_map, key.removeprefix("layer."))
        ours.data.copy_(theirs.expand_as(ours))
    output = phi.query(x)
    (output * recorded[f"{name}/weight"]).sum().backward()
    assert_equal(output, recorded[f"{name}/output"], f"{name}, output")
    for key, gradient in of_case(recorded, name, "gradients").items():
        ours = x.grad if key == "x" else getattr(phi.q_map, key.removeprefix("layer.")).grad.sum(0)
        assert_equal(ours, gradient, f"{name}, gradient of {key}")
