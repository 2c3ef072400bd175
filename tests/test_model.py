"""model.py against transformers, against itself packed and unpacked, and broken directories."""

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

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VOCAB = 120
GQA = Config(64, 96, 2, 4, 2, vocab_size=VOCAB, max_position_embeddings=256)
SHARD = "model-00001-of-00001.safetensors"


def random_model(config=GQA, seed=0):
    torch.manual_seed(seed)
    model = Model(config)
    load_weights(model, RandomWeights(config, seed))
    # larger than at initialization, so that attention and logits are far from uniform
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_prompts(lengths):
    return [torch.randint(3, VOCAB, (n,)) for n in lengths]


def packed(prompts):
    conversations = []
    for prompt in prompts:
        weights = torch.zeros(len(prompt))
        conversations.append((prompt.numpy(), weights.numpy()))
    return pack(conversations)


def logits(model, prompts):
    """Packed logits, a tensor per prompt."""
    batch = packed(prompts)
    with torch.no_grad():
        hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens)
        all_TV = model.lm_head(hidden_TD)
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
        vocab_size=VOCAB,
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
    folder = save(model, tmp_path / "m", shard_bytes=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = random_prompts([50])[0]
    with torch.no_grad():
        assert torch.allclose(logits(model, [prompt])[0], theirs(prompt[None]).logits[0], atol=1e-4)


def test_packed_is_one_by_one():
    model = random_model()
    prompts = random_prompts([1, 2, 30, 9])
    for prompt, got in zip(prompts, logits(model, prompts)):
        assert torch.allclose(got, logits(model, [prompt])[0], atol=1e-4)


def test_decoding_with_the_cache_is_the_full_forward():
    """Prompts of unequal length: every step's logits are those of each whole text alone."""
    model = random_model()
    texts = random_prompts([40, 25, 31])
    start = [20, 5, 1]
    batch = packed([text[:n] for text, n in zip(texts, start)])
    cache = KVCache(model.config, 3, 64)
    got = model.prefill(batch.tokens_T, batch.positions_T, batch.cu_seqlens, cache)
    whole = logits(model, texts)
    for step in range(20):
        for b in range(3):
            assert torch.allclose(got[b], whole[b][start[b] + step - 1], atol=1e-4), (step, b)
        tokens_B = torch.stack([text[n + step] for text, n in zip(texts, start)])
        got = model.decode(tokens_B, cache)
    assert cache.length_B.tolist() == [40, 25, 21]


def test_recomputing_blocks_changes_no_gradient():
    batch = packed(random_prompts([9, 30]))
    gradients = []
    for recompute in RECOMPUTE:
        model = random_model()
        for block in model.model.layers:
            block.recompute = recompute
        losses = model(
            batch.tokens_T, batch.positions_T, batch.cu_seqlens, batch.labels_T, torch.ones(39)
        )
        losses.loss_sum.backward()
        gradients.append([p.grad for p in model.parameters()])
    for none, cheap, everything in zip(*gradients):
        assert torch.equal(none, cheap) and torch.equal(none, everything)


def test_losses_are_the_weighted_sum_and_each_rows_own():
    """By hand, from the logits; rows without a weight are 0."""
    model = random_model()
    batch = packed(random_prompts([9, 30]))
    weights_T = torch.rand(39)
    weights_T[::3] = 0
    with torch.no_grad():
        hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens)
        logits_TV = model.lm_head(hidden_TD)
        losses = model(
            batch.tokens_T, batch.positions_T, batch.cu_seqlens, batch.labels_T, weights_T
        )
    nll_T = torch.nn.functional.cross_entropy(logits_TV, batch.labels_T, reduction="none")
    correct_T = (logits_TV.argmax(-1) == batch.labels_T).float()
    has_weight_T = (weights_T > 0).float()
    assert torch.allclose(losses.loss_sum, (weights_T * nll_T).sum(), rtol=1e-5)
    assert losses.weight_sum == weights_T.sum()
    assert torch.allclose(losses.nll_T, nll_T * has_weight_T, atol=1e-5)
    assert torch.equal(losses.correct_T, correct_T * has_weight_T)


def parameters_of(config):
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())


def test_sizes_are_the_published_ones():
    # Meta's checkpoints
    assert parameters_of(SIZES["llama-2-7b"]) == 6_738_415_616
    assert parameters_of(SIZES["llama-2-13b"]) == 13_015_864_320
    assert parameters_of(SIZES["llama-2-70b"]) == 68_976_648_192
    small = dataclasses.replace(SIZES["small"], vocab_size=32001)
    assert parameters_of(small) == 14_945_088


def test_train_flops_counts_every_matmul():
    """By hand for D 8, U 12, 2 layers, 2 heads of 4, 1 kv head, V 10."""
    config = Config(8, 12, 2, 2, 1, vocab_size=10)
    # q, k and v, o, mlp
    projections = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
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
        mean = stored.mean(0).expand(2, -1)
        rows = wider.rows(name, 0, 122)
        assert torch.equal(rows[:120], stored)
        assert torch.allclose(rows[120:], mean, atol=1e-6)
        assert torch.equal(wider.rows(name, 119, 122), rows[119:])
        assert torch.equal(wider.rows(name, 121, 122), rows[121:])


def edited(folder, **fields):
    """The folder, with these fields in its config.json; "absent" takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    kept = {key: value for key, value in config.items() if value != "absent"}
    path.write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", "yes"),
        ("num_local_experts", 8),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", [1]),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", LLAMA3 | {"low_freq_factor": 4.0}),
        ("quantization_config", {"bits": 4}),
        ("head_dim", 99),
        ("head_dim", 16.5),
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
    edited(folder, rope_parameters="absent", rope_theta=5e5)
    assert read_config(folder).rope_theta == 5e5
    newer = {"rope_type": "default", "rope_theta": 7e5}
    edited(folder, rope_parameters=newer, rope_theta="absent")
    assert read_config(folder).rope_theta == 7e5
    assert capsys.readouterr().err == ""
    edited(folder, rope_parameters="absent", rope_theta="absent")
    assert read_config(folder).rope_theta == 1e4
    assert "no rope_theta" in capsys.readouterr().err


NORM = "model.norm.weight"
WRONG_SIZE = f"{NORM} is \\[65\\], config.json says \\[64\\]"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (NORM, None, f"no tensor {NORM}"),
        (NORM, torch.ones(65), WRONG_SIZE),
        (NORM, torch.ones(64, dtype=torch.int8), f"{NORM} is stored as I8"),
        ("model.bogus", torch.ones(1), "model.bogus is no part"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, name, tensor, message):
    folder = save(random_model(), tmp_path / "m")
    tensors = load_file(folder / SHARD)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
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
    file = folder / SHARD
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
    file = folder / SHARD
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 64
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="00001.safetensors.*manifest"):
        load_model(folder)
