"""model.py against transformers, against itself packed and unpacked, and against broken directories."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import RECOMPUTE, SIZES, Config, KVCache, Model
from packing import pack
from support.budget import train_flops
from support.export import config_json, write_manifest, write_weights
from support.hf import (
    RandomWeights,
    SafetensorsWeights,
    check_manifest,
    load_model,
    load_weights,
    parameter_shapes,
    read_config,
)

GQA = Config(64, 96, 2, 4, 2, vocab_size=120, max_position_embeddings=256)


def random_model(config=GQA, seed=0):
    torch.manual_seed(seed)
    model = Model(config)
    load_weights(model, RandomWeights(config, seed))
    # larger than at initialization, so that attention and logits are far from uniform
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    return model


def random_prompts(lengths, vocab=120):
    return [torch.randint(3, vocab, (n,)) for n in lengths]


def packed(prompts):
    return pack([(p.numpy(), torch.zeros(len(p)).numpy()) for p in prompts])


def logits(model, prompts):
    """Packed logits, a tensor per prompt."""
    batch = packed(prompts)
    with torch.no_grad():
        all_TV = model.lm_head(model(batch.tokens_T, batch.positions_T, batch.cu_seqlens))
    return all_TV.split([len(p) for p in prompts])


def save(model, folder, dtype=torch.float32, **how):
    folder.mkdir(exist_ok=True)
    write_weights(folder, model.config, model.named_parameters(), dtype, **how)
    (folder / "config.json").write_text(json.dumps(config_json(model.config, dtype, 1, 2)))
    return folder


@pytest.mark.parametrize("heads, kv_heads, theta", [(4, 4, 10000.0), (4, 1, 5e5)])
def test_a_transformers_llama_in_several_shards_loads_with_equal_logits(
    tmp_path, heads, kv_heads, theta
):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_model(tmp_path)
    assert ours.config.rope_theta == theta
    prompts = random_prompts([1, 7, 40, 200])
    for prompt, got in zip(prompts, logits(ours, prompts)):
        with torch.no_grad():
            assert torch.allclose(got, theirs(prompt[None]).logits[0], atol=1e-4)


def test_transformers_loads_what_we_write(tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_model()
    theirs = AutoModelForCausalLM.from_pretrained(
        save(model, tmp_path / "m", shard_bytes=50_000)
    ).eval()
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    prompt = random_prompts([50])[0]
    with torch.no_grad():
        assert torch.allclose(logits(model, [prompt])[0], theirs(prompt[None]).logits[0], atol=1e-4)


def test_packed_is_one_by_one():
    model, prompts = random_model(), random_prompts([1, 2, 30, 9])
    for prompt, got in zip(prompts, logits(model, prompts)):
        assert torch.allclose(got, logits(model, [prompt])[0], atol=1e-4)


def test_decoding_with_the_cache_is_the_full_forward():
    """Prompts of unequal length in one batch: every step's logits are those of each whole text alone."""
    model, texts, start = random_model(), random_prompts([40, 25, 31]), [20, 5, 1]
    batch = packed([text[:n] for text, n in zip(texts, start)])
    cache = KVCache(model.config, 3, 64)
    got = model.prefill(batch.tokens_T, batch.positions_T, batch.cu_seqlens, cache)
    whole = logits(model, texts)
    for step in range(20):
        for b in range(3):
            assert torch.allclose(got[b], whole[b][start[b] + step - 1], atol=1e-4), (step, b)
        got = model.decode(torch.stack([text[n + step] for text, n in zip(texts, start)]), cache)


def test_recomputing_blocks_changes_no_gradient():
    batch, grads = packed(random_prompts([9, 30])), []
    for recompute in RECOMPUTE:
        model = random_model()
        for block in model.model.layers:
            block.recompute = recompute
        loss, _ = model(
            batch.tokens_T, batch.positions_T, batch.cu_seqlens, batch.labels_T, torch.ones(39)
        )
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


def test_sizes_are_the_published_ones():
    count = lambda name: sum(torch.Size(s).numel() for s in parameter_shapes(SIZES[name]).values())
    # Meta's checkpoints
    assert count("llama-2-7b") == 6_738_415_616 and count("llama-2-13b") == 13_015_864_320
    assert count("llama-2-70b") == 68_976_648_192
    small = dataclasses.replace(SIZES["small"], vocab_size=32001)
    assert sum(torch.Size(s).numel() for s in parameter_shapes(small).values()) == 14_945_088


def test_train_flops_counts_every_matmul():
    """By hand for D 8, F 12, 2 layers, 2 heads of 4, 1 kv head, V 10."""
    config = Config(8, 12, 2, 2, 1, vocab_size=10)
    projections = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k and v, o, mlp
    assert train_flops(config) == (6 * 2 * projections, 6 * 8 * 10, 6 * 2 * 8)


def test_random_weights_do_not_depend_on_who_asks():
    source = RandomWeights(GQA, 7)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.rows(name, 10, 20), source.rows(name, 0, 64)[10:20])
    assert not torch.equal(RandomWeights(GQA, 8).rows(name, 0, 64), source.rows(name, 0, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_added_rows_are_the_mean_and_the_rest_is_read_exactly(tmp_path, dtype):
    model = random_model()
    folder = save(model, tmp_path / "m", dtype)
    wider = SafetensorsWeights(folder, dataclasses.replace(GQA, vocab_size=122))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        stored = model.get_parameter(name).detach().to(dtype).float()
        rows = wider.rows(name, 0, 122)
        assert torch.equal(rows[:120], stored) and torch.allclose(
            rows[120:], stored.mean(0).expand(2, -1), atol=1e-6
        )
        assert torch.equal(wider.rows(name, 119, 122), rows[119:]) and torch.equal(
            wider.rows(name, 121, 122), rows[121:]
        )


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "absent"})
    )
    return folder


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("quantization_config", {"bits": 4}),
        ("head_dim", 99),
        ("hidden_size", "absent"),
        ("num_key_value_heads", 3),
    ],
)
def test_what_is_not_supported_stops_with_the_fields_name(tmp_path, field, value):
    folder = edited(save(random_model(), tmp_path / "m"), **{field: value})
    with pytest.raises(ValueError, match=f"config.json.*{field}"):
        read_config(folder)


def test_rope_theta_is_read_from_both_forms_and_a_missing_one_is_said(tmp_path, capsys):
    folder = save(random_model(), tmp_path / "m")
    assert read_config(edited(folder, rope_parameters="absent", rope_theta=5e5)).rope_theta == 5e5
    assert (
        read_config(
            edited(
                folder,
                rope_parameters={"rope_type": "default", "rope_theta": 7e5},
                rope_theta="absent",
            )
        ).rope_theta
        == 7e5
    )
    assert capsys.readouterr().err == ""
    assert (
        read_config(edited(folder, rope_parameters="absent", rope_theta="absent")).rope_theta == 1e4
    )
    assert "no rope_theta" in capsys.readouterr().err


def change(folder, edit):
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(NORM), f"no tensor {NORM}"),
        (
            lambda t: t.update({NORM: torch.ones(65)}),
            f"{NORM} is \\[65\\], config.json says \\[64\\]",
        ),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), f"{NORM} is stored as I8"),
        (lambda t: t.update({"model.bogus": torch.ones(1)}), "model.bogus is no part"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, edit, message):
    folder = save(random_model(), tmp_path / "m")
    change(folder, edit)
    with pytest.raises(ValueError, match=message):
        SafetensorsWeights(folder, GQA)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_broken_json_file_is_named(tmp_path, name, text):
    folder = save(random_model(), tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: not "):
        load_model(folder)


def test_a_missing_or_cut_file_is_named(tmp_path):
    folder = save(random_model(), tmp_path / "m")
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="00001.safetensors"):
        SafetensorsWeights(folder, GQA)
    file.unlink()
    with pytest.raises(ValueError, match="no model-00001-of-00001.safetensors"):
        SafetensorsWeights(folder, GQA)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)


def test_the_manifest_finds_a_flipped_bit(tmp_path, capsys):
    folder = save(random_model(), tmp_path / "m")
    check_manifest(folder)
    assert "no manifest.json" in capsys.readouterr().err
    write_manifest(folder)
    check_manifest(folder)
    file = folder / "model-00001-of-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 64
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="00001.safetensors.*manifest"):
        load_model(folder)
