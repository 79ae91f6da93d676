"""What is read off a system is what theory says of it, and an analysis shows it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from subquad import SubquadConfig, SubquadForCausalLM, mixers
from subquad.bench import systems
from subquad.ops.dynamics import matrix_system


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(log_decay, key_scale=1.0):
    q, k, v = draw(1, 12, 2, 4), key_scale * draw(1, 12, 2, 4, seed=1), draw(1, 12, 2, 3, seed=2)
    return matrix_system("gla", q, k, v, scale=1.0, log_decay=log_decay)


def test_a_constant_decay_has_its_half_life_and_its_eigenvalue():
    system = gated(torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64))
    torch.testing.assert_close(systems.half_lives(system), torch.tensor([[1.0], [0.5]], dtype=torch.float64))
    eigenvalues = systems.eigenvalues(system, 3)
    assert eigenvalues.shape == (1, 3, 2, 1)
    torch.testing.assert_close(eigenvalues[0, 0, :, 0], torch.tensor([0.5, 0.25], dtype=torch.float64))


def test_retention_decays_as_it_was_built():
    mixer = mixers.build("retention", 32, num_heads=4).double().eval()
    (system,) = mixer.dynamics(draw(1, 6, 32)).systems
    torch.testing.assert_close(systems.eigenvalues(system)[0, 0, :, 0], torch.exp(-mixer.slope.double()))


def test_a_delta_rule_touches_one_eigenvalue():
    k, beta = F.normalize(draw(1, 7, 2, 4), dim=-1), torch.rand(1, 7, 2, dtype=torch.float64) + 0.5
    system = matrix_system("delta_rule", k, k, k, scale=1.0, beta=beta)
    found = systems.eigenvalues(system, 7).real.sort(dim=-1).values
    torch.testing.assert_close(
        found[..., 0].sort().values, torch.minimum(1 - beta, torch.ones_like(beta)).sort().values
    )
    torch.testing.assert_close(found[..., 1:], torch.ones_like(found[..., 1:]))
    lives = systems.half_lives(system)
    assert bool((lives[:, 1:] == torch.inf).all())
    assert bool((lives[:, 0] < 10).all())


def test_coupling_tells_a_tied_gate_from_a_free_one():
    step = draw(1, 12, 2, seed=5).exp()
    q = v = draw(1, 12, 2, 1)
    tied = matrix_system("s6", q, step[..., None], v, scale=1.0, log_decay=-step.log().add(3).abs()[..., None])
    free = gated(torch.full((2,), -0.1, dtype=torch.float64))
    assert bool((systems.coupling(tied) < -0.9).all())
    torch.testing.assert_close(systems.coupling(free), torch.zeros(2, dtype=torch.float64))


def test_rank_counts_what_a_state_can_carry():
    ranks = systems.memory_rank(gated(None).weights())
    assert bool((ranks == 4).all())
    assert int(systems.memory_rank(torch.eye(8)[None, None])) == 0


def test_distance_is_zero_for_the_same_system_and_grows():
    slow, fast = (gated(torch.full((2,), value, dtype=torch.float64)) for value in (-0.1, -1.0))
    assert systems.distance(slow, slow) == 0
    assert systems.distance(slow, slow.normal_form()) < 1e-12
    assert systems.distance(slow, fast) > 0.1
    with pytest.raises(ValueError, match="compared"):
        systems.distance(slow, matrix_system("x", *(draw(1, 3, 2, 4),) * 3, scale=1.0))


def test_weight_by_distance_and_reach_of_a_window():
    weights = (torch.ones(16, 16).tril() - torch.ones(16, 16).tril(-4)).double()[None, None]
    assert systems.reach(weights).item() == 3
    assert systems.mean_weight_by_distance(weights)[0].tolist() == [1.0] * 4 + [0.0] * 12


def test_a_linearisation_of_a_linear_map_is_the_map():
    mixer = mixers.build("linear", 4, num_heads=1, normalize=False, feature_map="identity").double().eval()
    with torch.no_grad():
        for projection in (mixer.q_proj, mixer.k_proj):
            projection.weight.zero_()
    moves = systems.linearized(mixer, draw(1, 5, 4))
    assert moves.shape == (5, 5)
    assert float(moves.abs().max()) == 0
    softmax = systems.linearized(mixers.build("softmax", 4, num_heads=1).double(), draw(1, 5, 4))
    assert float(softmax.triu(1).abs().max()) == 0
    assert float(softmax.diagonal().min()) > 0


def test_an_analysis_rebuilds_and_writes_everything(tmp_path):
    analysis = systems.analyze_mixers(["softmax", "gla", "delta_net", "diag_attention"], dim=16, num_heads=2, tokens=24)
    assert [part.name for part in analysis.parts] == ["softmax", "gla", "delta_net"]
    assert list(analysis.refused) == ["diag_attention"]
    assert max(part.error for part in analysis.parts) < 1e-5
    page = analysis.write(tmp_path).read_text()
    assert page.count("<img") == 5
    rows = json.loads((tmp_path / "analysis.json").read_text())["systems"]
    by_name = {row["mixer"]: row for row in rows}
    assert by_name["softmax"]["half_life"] is None
    assert by_name["gla"]["state_bytes"] == 4 * 2 * 4 * 8
    assert by_name["delta_net"]["outside"]


def test_a_model_is_analysed_layer_by_layer():
    config = SubquadConfig(
        mixers=["gla", "softmax"], vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    ids = torch.randint(0, 32, (2, 20), generator=torch.Generator().manual_seed(0))
    analysis = systems.analyze_model(SubquadForCausalLM(config), ids)
    assert [part.name for part in analysis.parts] == ["layer 0: GatedLinearAttention", "layer 1: SoftmaxAttention"]
    assert max(part.error for part in analysis.parts) < 1e-5
