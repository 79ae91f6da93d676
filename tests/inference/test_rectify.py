"""Rectification: the exact distribution under caps, the processor in generate, and the value model's recursion."""

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from subquad import SubquadConfig, SubquadForCausalLM, tasks
from subquad.inference.dead_end_value import (
    DeadEndValue,
    LabelledTexts,
    SarsaObjective,
    exact_value,
    sample_and_score,
    sarsa_loss,
    train_value,
)
from subquad.inference.rectification import rectification_curve
from subquad.inference.rectify import RectifyLogits, rectify
from subquad.training import TrainingOptions


def draw(rows=64, size=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(rows, size, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return log_probs, torch.rand(rows, size, generator=generator, dtype=torch.float64) ** 2


def divergence(q, p):
    return (q * (q.log() - p.log()).where(q > 0, 0)).sum(-1)


class TestRectify:
    def test_caps_are_kept_and_the_rest_keeps_its_proportions(self):
        log_probs, caps = draw()
        caps = caps / caps.sum(-1, keepdim=True).clamp(max=1)  # feasible
        q, p = rectify(log_probs, caps).exp(), log_probs.exp()
        torch.testing.assert_close(q.sum(-1), torch.ones(len(q), dtype=q.dtype))
        assert bool((q <= caps + 1e-9).all())
        free = q < caps - 1e-9
        for row in range(len(q)):
            ratio = (q[row] / p[row])[free[row]]
            assert not len(ratio) or float(ratio.max() - ratio.min()) < 1e-9 * float(ratio.max())
            assert not len(ratio) or float(ratio.min()) >= 1 - 1e-12

    def test_it_is_the_limit_of_the_iteration(self):
        log_probs, caps = draw()
        caps = caps / caps.sum(-1, keepdim=True).clamp(max=0.8)
        caps = caps.clamp(max=1)
        feasible = caps.sum(-1) > 1.05
        exact, rounds = (rectify(log_probs, caps, rounds=n).exp()[feasible] for n in (None, 200))
        assert int(feasible.sum()) > 10
        torch.testing.assert_close(exact, rounds, atol=1e-5, rtol=0)

    def test_nothing_feasible_is_nearer(self):
        log_probs, caps = draw(rows=1)
        caps = (caps / caps.sum() * 1.5).clamp(max=1)
        best = divergence(rectify(log_probs, caps).exp(), log_probs.exp())
        points = torch.distributions.Dirichlet(torch.ones(7, dtype=torch.float64))
        torch.manual_seed(1)
        others = points.sample((20_000,))
        others = torch.cat([others, rectify(draw(2000, seed=2)[0], caps.expand(2000, -1)).exp()])
        feasible = others[(others <= caps + 1e-12).all(-1)]
        assert len(feasible) > 1000
        assert float(divergence(feasible, log_probs.exp()).min()) >= float(best) - 1e-9

    def test_by_hand(self):
        for p, c, q in (
            ([0.9, 0.1], [0.3, 1.0], [0.3, 0.7]),
            ([0.5, 0.3, 0.2], [1.0, 1.0, 1.0], [0.5, 0.3, 0.2]),
            ([1.0], [0.2], [1.0]),  # no safe token: the caps, normalised
            ([0.5, 0.5], [0.1, 0.3], [0.25, 0.75]),
            ([1.0, 0.0], [0.5, 1.0], [1.0, 0.0]),  # what the base cannot choose stays impossible
        ):
            found = rectify(torch.tensor(p).log(), torch.tensor(c)).exp()
            torch.testing.assert_close(found, torch.tensor(q))

    @pytest.mark.parametrize(
        ("log_probs", "caps", "options", "error"),
        [
            (torch.zeros(2), torch.zeros(3), {}, ValueError),
            (torch.zeros(2), torch.tensor([0.5, 1.5]), {}, ValueError),
            (torch.zeros(2), torch.tensor([0, 1]), {}, TypeError),
            (torch.zeros(2), torch.ones(2), {"rounds": 0}, ValueError),
        ],
    )
    def test_bad_input_is_refused(self, log_probs, caps, options, error):
        with pytest.raises(error):
            rectify(log_probs, caps, **options)


FIELDS = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=None)
    ).eval()


def value_model(kind="gru", seed=1):
    torch.manual_seed(seed)
    backbone = gpt2(seed) if kind == "gpt2" else SubquadForCausalLM(SubquadConfig(mixers=kind, **FIELDS))
    value = DeadEndValue(backbone).eval()
    with torch.no_grad():
        value.head[2].weight.mul_(8)
        value.head[2].bias.sub_(0.4)
    return value


class FromScratch(RectifyLogits):
    """The same without a cache."""

    def _rows_of(self, input_ids):
        return None


@pytest.mark.parametrize("kind", ["gru", "gpt2"])
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_the_cache_changes_nothing(kind, options):
    model, value = gpt2(), value_model(kind)
    prompts = torch.randint(1, 19, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    prompts[0, :3], mask[0, :3] = 0, 0
    found = []
    for processor in (RectifyLogits, FromScratch):
        torch.manual_seed(0)
        rectifier = processor(value, 0.2, attention_mask=mask)
        found.append(
            model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=10,
                logits_processor=LogitsProcessorList([rectifier]),
                pad_token_id=0,
                **options,
            )
        )
    assert torch.equal(*found)


def test_a_padded_prompt_is_rectified_as_it_would_be_alone():
    value = value_model("gpt2")
    prompt = torch.tensor([[3, 4, 5]])
    padded, mask = torch.tensor([[0, 0, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1]])
    scores = torch.randn(1, 19)
    alone = RectifyLogits(value)(prompt, scores)
    torch.testing.assert_close(RectifyLogits(value, attention_mask=mask)(padded, scores), alone, atol=1e-5, rtol=1e-5)


def test_a_value_of_zero_leaves_generation_as_it_is():
    model, value = gpt2(), value_model()
    with torch.no_grad():
        for parameter in value.head.parameters():
            parameter.zero_()
    prompt = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=True, pad_token_id=0)
    torch.manual_seed(0)
    processor = RectifyLogits(value, epsilon=0.0)
    rectified = model.generate(prompt, max_new_tokens=12, do_sample=True, pad_token_id=0, logits_processor=[processor])
    assert torch.equal(plain, rectified)
    assert processor.without_safe_token == 0


def test_a_table_learns_the_exact_value():
    world = tasks.dead_ends(0, num_tokens=3, length=3, fatal_tokens=1)
    texts = torch.tensor(np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3))
    rewards = -torch.tensor(world.is_undesired(texts.numpy())).float()
    states = torch.tensor(world.states(texts.numpy()))
    policy = torch.tensor(world.policy)
    chances = policy[states[:, :-1], texts].prod(-1)
    table = torch.zeros(3, 8, 3, requires_grad=True, dtype=torch.float64)
    times = torch.arange(3).expand(len(texts), 3)
    for _ in range(20):  # full sweeps, every text by its probability
        q = table[times, states[:, :-1]]
        losses = torch.stack(
            [sarsa_loss(q[i : i + 1], q[i : i + 1], texts[i : i + 1], rewards[i : i + 1]) for i in range(len(texts))]
        )
        (gradient,) = torch.autograd.grad((chances * losses).sum() * 3, table)
        weight = torch.zeros_like(table)
        weight.index_put_((times, states[:, :-1], texts), chances[:, None].expand(-1, 3), accumulate=True)
        with torch.no_grad():
            table -= gradient / (2 * weight).clamp(min=1e-12)
    exact = torch.tensor(exact_value(world))
    seen = weight > 1e-9
    assert int(seen.sum()) >= 9
    torch.testing.assert_close(table.detach()[seen], exact[seen], atol=1e-3, rtol=0)


def test_a_fatal_token_is_never_chosen_under_the_exact_value():
    world = tasks.dead_ends(1)
    exact = torch.tensor(exact_value(world))
    q = rectify(torch.tensor(world.policy).log(), (1 + exact[-1]).clamp(1e-7, 1)).exp()
    fatal = torch.tensor(world.following[6] == 7)
    assert float(q[6][fatal].max()) <= 1e-6


def test_the_loss_has_no_gradient_in_its_target_and_ignores_padding():
    q = torch.randn(2, 4, 5, requires_grad=True)
    target = torch.randn(2, 4, 5, requires_grad=True)
    actions, rewards = torch.randint(5, (2, 4)), torch.tensor([-1.0, 0.0])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    loss = sarsa_loss(q, target, actions, rewards, mask)
    loss.backward()
    assert target.grad is None
    assert float(q.grad[1, 2:].abs().max()) == 0
    alone = 2 / 6 * sarsa_loss(q[1:, :2], target[1:, :2], actions[1:, :2], rewards[1:])
    whole = 4 / 6 * sarsa_loss(q[:1], target[:1], actions[:1], rewards[:1])
    torch.testing.assert_close(loss, alone + whole)


def train(value, out=None, steps=6, resume=False):
    world = tasks.dead_ends(1)
    texts = world.sample(64, seed=0)
    rewards = -world.is_undesired(texts).astype(float)
    rows = np.concatenate([np.full((64, 1), 12), texts], 1)
    options = TrainingOptions(steps=steps, batch_size=8, learning_rate=3e-3, save_every=2)
    return train_value(value, rows, rewards, options, out=out, resume=resume, console=Console(quiet=True))


def test_training_resumes_with_its_target_head(tmp_path, monkeypatch):
    whole, stopped, resumed = value_model(), value_model(), value_model()
    train(whole)
    begin = SarsaObjective.begin_step

    def stopping(self, step):
        if step == 5:
            raise KeyboardInterrupt
        begin(self, step)

    monkeypatch.setattr(SarsaObjective, "begin_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path)
    monkeypatch.undo()
    train(resumed, tmp_path, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(whole.target_head[0].weight, whole.head[0].weight)


def test_folders_keep_the_value_model(tmp_path):
    value = value_model()
    value.save_pretrained(tmp_path)
    again = DeadEndValue.from_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens)[0], value(tokens)[0])


def test_texts_are_sampled_and_scored_to_their_end():
    model = gpt2()
    tokenizer = tasks.byte_tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None)
    )
    texts, rewards = sample_and_score(
        model, tokenizer, ["ab", "c"], lambda text: -float("a" in text), continuations=3, max_new_tokens=4
    )
    assert len(texts) == 6
    assert rewards[:3] == [-1.0] * 3
    with pytest.raises(ValueError, match="prompt"):
        sample_and_score(model, tokenizer, [], lambda text: 0.0)


def test_the_curve_shows_what_strictness_costs():
    tokenizer = tasks.byte_tokenizer()
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SubquadForCausalLM(SubquadConfig(hidden_size=16, mixers="gla", **fields)).eval()
    value = DeadEndValue(SubquadForCausalLM(SubquadConfig(hidden_size=16, mixers="gru", **fields))).eval()
    fatal = tokenizer("".join(map(chr, range(32, 122))))["input_ids"]
    with torch.no_grad():  # many tokens are known to be fatal
        value.head[2].bias[fatal] = -1.0
    bad = {tokenizer.decode([token]) for token in fatal}

    def reward(text):
        return -float(any(character in bad for character in text[1:]))

    rows = rectification_curve(
        model, tokenizer, value, ["z"], reward, epsilons=(0.0, 0.05), continuations=20, max_new_tokens=4
    )
    assert [row.epsilon for row in rows] == [None, 0.0, 0.05]
    assert rows[0].undesired > 0.5
    assert rows[0].divergence == 0
    assert rows[2].undesired <= rows[1].undesired < rows[0].undesired
    assert rows[2].divergence >= rows[1].divergence > 0


def test_bad_input_is_refused():
    value = value_model()
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        RectifyLogits(value, epsilon=1.0)
    with pytest.raises(ValueError, match="tokenizer"):
        RectifyLogits(value)(torch.tensor([[1]]), torch.zeros(1, 20))
    with pytest.raises(ValueError, match=r"\[-1, 0\]"):
        LabelledTexts([[1, 2]], [1.0], 1, 0)
    with pytest.raises(ValueError, match="two tokens"):
        LabelledTexts([[1]], [0.0], 1, 0)
    with pytest.raises(ValueError, match="tell apart"):
        train_value(value, [[1, 2]], [0.0], TrainingOptions(steps=1, batch_size=1, learning_rate=1e-3))
    with pytest.raises(ValueError, match="language model"):
        DeadEndValue(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no value model"):
        DeadEndValue.from_pretrained("nowhere")
    value.head[2].bias.data.sub_(10)
    with pytest.warns(UserWarning, match="no safe continuation"):
        RectifyLogits(value)(torch.tensor([[1]]), torch.zeros(1, 19))
