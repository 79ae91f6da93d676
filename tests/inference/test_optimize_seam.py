"""The seam: one instance changes and can be had back, whatever else is done to the model; what is not known is left."""

import copy
import functools
import pickle
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.qwen3_next import modeling_qwen3_next

from subquad import optimize
from subquad.bench.transformers_families import FAMILIES, TINY
from subquad.inference.optimize import replacement, seam, undo

IDS = torch.randint(2, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(name="mamba"):
    return FAMILIES[name].build()


def ours(model):
    return sum(seam.is_ours(value) for module in model.modules() for value in module.__dict__.values())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def known(monkeypatch):
    """What is known of classes is forgotten before and after: the test changes them."""
    replacement.forget()
    yield monkeypatch
    monkeypatch.undo()
    replacement.forget()


def test_only_this_model_changes_and_only_until_it_is_undone():
    model, other = tiny(), tiny()
    plain = logits(model)
    done = optimize(model)
    assert (ours(model), ours(other)) == (2, 0)
    assert not torch.equal(logits(model), plain)  # rounded otherwise: another code ran
    assert torch.equal(logits(other), plain)
    done.undo()
    assert ours(model) == 0
    assert torch.equal(logits(model), plain)


def test_a_dry_run_says_what_would_change_and_changes_nothing():
    model = tiny("jamba")
    plan = optimize(model, dry_run=True)
    assert ours(model) == 0
    assert str(plan) == "jamba: 1 x JambaMambaMixer would be replaced by short_convolution, selective_scan"
    assert [layer.path for layer in plan.layers] == ["model.layers.0.mamba"]
    assert "replaced by" in str(optimize(model))


def test_twice_is_once_and_a_with_block_ends_it():
    model = tiny()
    with optimize(model):
        optimize(model)
        assert ours(model) == 2
    assert ours(model) == 0
    with pytest.raises(KeyError), optimize(model):
        raise KeyError
    assert ours(model) == 0
    assert not undo(model)


def test_copies_stay_ours_and_files_hold_the_plain_model(tmp_path):
    model = tiny()
    plain, names = logits(model), list(model.state_dict())
    optimize(model)
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert ours(copied) == 2
    assert torch.equal(logits(copied), expected)
    undo(model)  # the copy does not call into the model it was made from
    model.backbone.layers[0].mixer.A_log.data.zero_()
    assert torch.equal(logits(copied), expected)
    assert list(copied.state_dict()) == names
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), plain)
    loaded = pickle.loads(pickle.dumps(copied))
    assert ours(loaded) == 0
    assert torch.equal(logits(loaded), plain)
    assert optimize(loaded).replaced
    assert torch.equal(logits(loaded), expected)


class CountingHook(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerate_hooks_stay_on(hook_first):
    model, plain = tiny(), tiny()
    mixer, hook = model.backbone.layers[0].mixer, CountingHook()
    if not hook_first:
        optimize(model)
    add_hook_to_module(mixer, hook)
    if hook_first:
        optimize(model)
    assert not torch.equal(logits(model), logits(plain))
    assert hook.calls == 1
    undo(model)
    assert torch.equal(logits(model), logits(plain))
    assert hook.calls == 2
    remove_hook_from_module(mixer)
    assert torch.equal(logits(model), logits(plain))
    assert hook.calls == 2


def test_a_method_that_somebody_else_replaced_is_left_alone():
    model = tiny()
    mixer = model.backbone.layers[1].mixer
    mixer.forward = types.MethodType(lambda self, hidden_states, **_: hidden_states, mixer)
    plan = optimize(model)
    assert [layer.reason is None for layer in plan.layers] == [True, False]
    assert "already replaced" in str(plan)
    plan.undo()
    assert "forward" in mixer.__dict__


def changed(function):
    """The same function with another source, wrapped as transformers wraps its own."""

    def mamba_selective_scan(*args, **kwargs):
        return function(*args, **kwargs)

    return mamba_selective_scan


def test_a_changed_function_of_transformers_is_not_replaced(known):
    known.setattr(modeling_mamba, "mamba_selective_scan", changed(modeling_mamba.mamba_selective_scan))
    model = tiny()
    plan = optimize(model)
    assert not plan.replaced
    assert ours(model) == 0
    assert "its mamba_selective_scan is not the one known" in str(plan)


def test_a_changed_layer_of_its_own_is_not_replaced(known):
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    original = RwkvSelfAttention.forward
    known.setattr(RwkvSelfAttention, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    plan = optimize(tiny("rwkv"))
    assert {layer.kind: layer.reason is None for layer in plan.layers} == {
        "RwkvSelfAttention": False,
        "RwkvFeedForward": True,
    }


def test_a_changed_forward_of_known_functions_keeps_its_own_way_in_decoding(known):
    """Then the step through our kernels, which stands for the whole of it, is not taken."""
    inner = modeling_mamba.MambaMixer.forward

    @functools.wraps(inner)
    def forward(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        return inner(self, -hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)

    known.setattr(modeling_mamba.MambaMixer, "forward", forward)
    model = tiny()
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    optimize(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


def test_packages_that_need_a_gpu_are_not_called(known):
    """With flash-linear-attention and no GPU transformers' own layers fail; ours do not call it."""

    def broken(original):
        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            raise RuntimeError("0 active drivers ([]). There should only be one.")

        return wrapped

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        known.setattr(modeling_qwen3_next, name, broken(getattr(modeling_qwen3_next, name)))
    model = tiny("qwen3_next")
    with pytest.raises(RuntimeError, match="active drivers"):
        logits(model)
    optimize(model)
    assert bool(logits(model).isfinite().all())
    model.generate(IDS, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", ["bamba", "qwen3_next"])
def test_packed_sequences_are_refused(name):
    model = tiny(name)
    optimize(model)
    packed = {"seq_idx": torch.zeros(1, 9, dtype=torch.int32), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    with pytest.raises(ValueError, match="not kept apart"):
        model(input_ids=IDS[:1], use_cache=False, **packed)


def test_an_optimised_model_compiles_as_one_graph():
    torch._dynamo.reset()
    model = FAMILIES["mamba"].build(settings=TINY | {"num_hidden_layers": 1})
    optimize(model)
    with torch.no_grad():
        graph = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="eager")
        torch.testing.assert_close(graph(IDS), logits(model), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = tiny().train()
        optimize(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([x.grad for x in model.parameters()])
    for plain, checkpointed in zip(*found):
        torch.testing.assert_close(checkpointed, plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["mamba", "zamba", "mamba2", "falcon_h1", "qwen3_next", "olmo_hybrid", "kimi_linear", "minimax", "rwkv"]
)
def test_bfloat16_models_stay_bfloat16_and_are_as_near_to_float32_as_before(name):
    ids = IDS[:1]
    expected = tiny(name)(input_ids=ids, use_cache=False).logits
    narrow, errors = {x: tiny(name).to(torch.bfloat16) for x in ("plain", "ours")}, {}
    optimize(narrow["ours"])
    for which, model in narrow.items():
        out = model(input_ids=ids[:, :8], use_cache=True)
        past = "state" if name == "rwkv" else "cache"
        one = model(input_ids=ids[:, 8:], use_cache=True, **{past: out[past]})
        errors[which] = float((torch.cat([out.logits, one.logits], 1) - expected).abs().max())
        assert {x.dtype for n, x in model.named_parameters() if "time_" not in n} == {torch.bfloat16}
    # both are sums of the same roundings in another order; of some thousand logits the worst is meant
    assert errors["ours"] <= 1.5 * errors["plain"]


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match="takes a torch module"):
        optimize("mamba")
    assert "nothing to replace" in str(optimize(nn.Linear(2, 2)))
