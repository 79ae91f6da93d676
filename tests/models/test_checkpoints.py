"""Checkpoints of other libraries: equal logits, and a sentence for what does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from subquad.models.checkpoints import convert, load_foreign

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"


@pytest.mark.skipif(not (PEERS / "fla").is_dir(), reason="flash-linear-attention is not in .peers (make peers)")
@pytest.mark.parametrize("kind", ["gla", "delta_net", "gated_deltanet", "retnet"])
def test_flash_linear_attention_models_give_equal_logits(kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    script = ROOT / "tests/peers/fla_checkpoint.py"
    command = [sys.executable, str(script), kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_file(tmp_path / "expected.out")
    model = load_foreign(tmp_path)
    logits = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    loaded = type(model).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(loaded(expected["ids"]).logits, logits)


def fla_like(**changes):
    """The configuration and weights of a small GLA, written in flash-linear-attention's names."""
    dim, hidden, vocabulary = 16, 24, 11
    config = {
        "model_type": "gla",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "vocab_size": vocabulary,
        "norm_eps": 1e-6,
        **changes,
    }
    shapes = {
        "model.embeddings.weight": (vocabulary, dim),
        "model.norm.weight": (dim,),
        "lm_head.weight": (vocabulary, dim),
        "model.layers.0.attn_norm.weight": (dim,),
        "model.layers.0.mlp_norm.weight": (dim,),
        "model.layers.0.attn.q_proj.weight": (dim // 2, dim),
        "model.layers.0.attn.k_proj.weight": (dim // 2, dim),
        "model.layers.0.attn.v_proj.weight": (dim, dim),
        "model.layers.0.attn.g_proj.weight": (dim, dim),
        "model.layers.0.attn.gk_proj.0.weight": (16, dim),
        "model.layers.0.attn.gk_proj.1.weight": (dim // 2, 16),
        "model.layers.0.attn.gk_proj.1.bias": (dim // 2,),
        "model.layers.0.attn.o_proj.weight": (dim, dim),
        "model.layers.0.attn.g_norm_swish_gate.weight": (dim // 2,),
        "model.layers.0.mlp.gate_proj.weight": (hidden, dim),
        "model.layers.0.mlp.up_proj.weight": (hidden, dim),
        "model.layers.0.mlp.down_proj.weight": (dim, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    return config, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_every_weight_finds_its_place():
    config, weights = fla_like()
    model = convert(config, weights)
    own = model.state_dict()
    assert torch.equal(own["model.layers.0.mixer.gk_proj.1.bias"], weights["model.layers.0.attn.gk_proj.1.bias"])
    assert torch.equal(
        own["model.layers.0.mixer.o_norm.weight"], weights["model.layers.0.attn.g_norm_swish_gate.weight"]
    )
    assert sum(x.numel() for x in own.values()) == sum(x.numel() for x in weights.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "glaa"}, "did you mean 'gla'"),
        ({"use_gv": True}, "use_gv=True"),
        ({"clamp_min": -3.0}, "clamp_min"),
        ({"hidden_act": "powlu"}, "supported: 'swish'"),
        ({"num_hidden_layers": 2}, "missing: model.layers.1"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        convert(*fla_like(**changes))


def test_folders_without_a_model_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_foreign(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fla_like()[0]))
    with pytest.raises(ValueError, match="no weights"):
        load_foreign(tmp_path)
    save_file(fla_like()[1], tmp_path / "model.safetensors")
    assert load_foreign(tmp_path).config.hidden_size == 16


def transnormer(layers=3, dim=16, heads=4, hidden=24, vocabulary=11):
    config = {
        "model_type": "transnormer",
        "decoder_layers": layers,
        "decoder_embed_dim": dim,
        "decoder_attention_heads": heads,
        "glu_dim": hidden,
        "vocab_size": vocabulary,
        "linear_act_fun": "silu",
        "norm_type": "simplermsnorm",
        "linear_use_lrpe_list": [1] + [0] * (layers - 1),
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {"model.embed_tokens.weight": draw(vocabulary, dim), "lm_head.weight": draw(vocabulary, dim)}
    for i in range(layers):
        at = f"model.layers.{i}."
        weights |= {
            f"{at}token_mixer.qkvu_proj.weight": draw(4 * dim, dim),
            f"{at}token_mixer.out_proj.weight": draw(dim, dim),
            f"{at}channel_mixer.l1.weight": draw(hidden, dim),
            f"{at}channel_mixer.l2.weight": draw(hidden, dim),
            f"{at}channel_mixer.l3.weight": draw(dim, hidden),
        }
    weights["model.layers.0.token_mixer.lrpe.theta"] = draw(heads, 1, dim // heads)
    return config, weights


def test_transnormer_llm_equals_its_formulas():
    """Sheet of the released model: scaled embeddings, gated linear attention by its quadratic form, SGLU, SRMSNorm."""
    config, w = transnormer()
    layers, dim, heads = 3, 16, 4
    ids = torch.tensor([[1, 4, 2, 8, 5, 7, 3]])

    def norm(x):
        return x / (x.norm(dim=-1, keepdim=True) / dim**0.5 + 1e-6)

    x = dim**0.5 * w["model.embed_tokens.weight"][ids]
    step = torch.arange(7)
    for i in range(layers):
        at = f"model.layers.{i}."
        q, k, v, u = (norm(x) @ w[f"{at}token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (F.silu(q), F.silu(k), v))
        if i == 0:
            angle = step[:, None, None] * w[f"{at}token_mixer.lrpe.theta"][:, 0]
            q, k = (torch.cat([t * angle.cos(), t * angle.sin()], -1) for t in (q, k))
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads) * (1 - i / (layers - 1) + 1e-5)
        decay = torch.exp(-slopes[:, None, None] * (step[:, None] - step)).tril()
        o = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, decay, v).flatten(-2)
        x = x + (u * norm(o)) @ w[f"{at}token_mixer.out_proj.weight"].T
        y = norm(x)
        y = (y @ w[f"{at}channel_mixer.l1.weight"].T) * (y @ w[f"{at}channel_mixer.l2.weight"].T)
        x = x + y @ w[f"{at}channel_mixer.l3.weight"].T
    expected = norm(x) @ w["lm_head.weight"].T
    torch.testing.assert_close(convert(config, w).eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def transformers_mamba(**options):
    """A small random Mamba of transformers, and its configuration as its folder would hold it."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=40, **{"pad_token_id": 0, **options})
    theirs = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("embeddings.weight", "lm_head.weight", "conv1d.bias", "norm.weight", "D")):
                parameter.normal_()
    return theirs, config


MAMBA_OPTIONS = [{}, {"use_bias": True, "use_conv_bias": False, "state_size": 5, "time_step_rank": 3, "conv_kernel": 3}]


@pytest.mark.parametrize("options", [*MAMBA_OPTIONS, {"tie_word_embeddings": False, "expand": 3}])
def test_transformers_mamba_gives_equal_logits_and_gradients(options, tmp_path):
    theirs, _ = transformers_mamba(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    ids = torch.randint(1, 40, (2, 37), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    ours(ids).logits.cos().sum().backward()
    expected.cos().sum().backward()
    pairs = [(ours.model.embed_tokens.weight, theirs.backbone.embeddings.weight)]
    for mine, block in zip(ours.model.mixers(), theirs.backbone.layers):
        own = dict(block.mixer.named_parameters())
        pairs += [(p, own[name]) for name, p in mine.named_parameters()]
    for mine, other in pairs:
        expected = other.grad.view(mine.shape)
        torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    ours.save_pretrained(tmp_path / "ours")
    again = type(ours).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("options", MAMBA_OPTIONS)
@torch.no_grad()
def test_transformers_mamba_writes_the_same_tokens_alone_batched_and_in_chunks(options):
    theirs, config = transformers_mamba(eos_token_id=None, **options)
    ours = convert(config.to_dict(), theirs.state_dict()).eval()
    prompts = [torch.randint(1, 40, (1, n), generator=torch.Generator().manual_seed(n)) for n in (2, 9, 14)]
    greedy = {"max_new_tokens": 12, "do_sample": False}
    alone = [ours.generate(p, **greedy)[0, p.shape[1] :] for p in prompts]
    for prompt, tokens in zip(prompts, alone):
        assert torch.equal(theirs.generate(prompt, **greedy)[0, prompt.shape[1] :], tokens)
    assert len({tuple(tokens.tolist()) for tokens in alone}) == 3
    batch = torch.cat([F.pad(p, (14 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (14 - p.shape[1], 0)) for p in prompts])
    together = ours.generate(batch, attention_mask=mask, **greedy)
    assert torch.equal(together[:, 14:], torch.stack(alone))
    assert torch.equal(theirs.generate(batch, attention_mask=mask, **greedy), together)
    whole, cache, pieces = ours(prompts[2]).logits, None, []
    for piece in prompts[2].split([1, 6, 2, 5], 1):
        output = ours(piece, cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def original_mamba(**cell):
    """The configuration and weights of a small Mamba under the names of the original repository."""
    theirs, _ = transformers_mamba()
    config = {
        "d_model": 32,
        "n_layer": 3,
        "vocab_size": 37,  # the weights are padded to 40 rows
        "ssm_cfg": cell,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    weights = {name.replace("embeddings", "embedding"): x for name, x in theirs.state_dict().items()}
    return theirs, config, weights


@pytest.mark.parametrize("cell", [{}, {"layer": "Mamba1", "d_state": 16, "dt_rank": 2}])
def test_the_original_mamba_layout_loads(cell, tmp_path):
    theirs, config, weights = original_mamba(**cell)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ids = torch.randint(1, 37, (1, 20), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    actual = load_foreign(tmp_path)(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_what_subquad_does_not_have_of_mamba_gets_a_sentence():
    theirs, config = transformers_mamba(hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        convert(config.to_dict(), theirs.state_dict())
    for changes, message in (({"layer": "Mamba2"}, "Mamba2"), ({"d_state": 8}, None)):
        _, config, weights = original_mamba(**changes)
        with pytest.raises((ValueError, RuntimeError), match=message):
            convert(config, weights)
    with pytest.raises(ValueError, match="attn_layer_idx"):
        convert({**original_mamba()[1], "attn_layer_idx": [1]}, weights)
