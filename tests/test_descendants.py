"""LLaMA's descendants against transformers: tied heads, Llama-3.1's RoPE, heads of their own width,
Mistral's window."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import SHARD, VOCAB, edited, logits, packed, random_model, random_prompts, save

from model import Config, RopeScaling
from recipe import TrainConfig
from support.budget import OptimizerState, memory_parts
from support.hf import SafetensorsWeights, load_model, parameter_shapes, read_config

# An original context of 64 tokens, so that 200 tokens see all three kinds of pairs.
SCALING = RopeScaling(8.0, 1.0, 4.0, 64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}

# tied, head_dim, scaling, kv heads
COMBINATIONS = list(itertools.product((False, True), (None, 32), (None, SCALING), (4, 1)))


def small(tied, head_dim, scaling, kv_heads):
    return Config(
        64,
        96,
        2,
        4,
        kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        rope_scaling=scaling,
    )


@pytest.mark.parametrize("tied, head_dim, scaling, kv_heads", COMBINATIONS)
def test_every_combination_has_transformers_logits_and_gradient(
    tmp_path, tied, head_dim, scaling, kv_heads
):
    from transformers import AutoModelForCausalLM

    config = small(tied, head_dim, scaling, kv_heads)
    ours = random_model(config)
    folder = save(ours, tmp_path / "m")
    assert read_config(folder) == config
    # a tied head is in the files once
    assert ("lm_head.weight" in load_file(folder / SHARD)) is not tied
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is tied

    prompts = random_prompts([1, 7, 200])
    for prompt, got in zip(prompts, logits(ours, prompts)):
        with torch.no_grad():
            assert torch.allclose(got, theirs(prompt[None]).logits[0], atol=1e-5, rtol=1e-5)

    # The gradient of a plain next-token loss: a tied matrix gets that of both its uses.
    (prompt,) = random_prompts([40])
    batch = packed([prompt])
    weights_T = torch.ones(len(prompt))
    weights_T[-1] = 0.0
    labels_T = prompt.roll(-1)
    losses = ours(batch.tokens_T, batch.positions_T, batch.cu_seqlens, labels_T, weights_T)
    (losses.loss_sum / losses.weight_sum).backward()
    theirs(prompt[None], labels=prompt[None]).loss.backward()
    found = dict(ours.named_parameters())
    assert ("lm_head.weight" in found) is not tied
    for name, parameter in theirs.named_parameters():
        gradient = found[name].grad
        error = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_rope_is_read_in_both_spellings_of_transformers(tmp_path):
    folder = save(random_model(), tmp_path / "m")
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    edited(folder, rope_parameters="absent", rope_theta=5e5, rope_scaling=LLAMA3)
    assert read_config(folder).rope_scaling == scaling
    assert read_config(folder).rope_theta == 5e5
    edited(folder, rope_parameters=LLAMA3 | {"rope_theta": 7e5}, rope_theta="absent")
    edited(folder, rope_scaling="absent")
    assert read_config(folder).rope_scaling == scaling
    assert read_config(folder).rope_theta == 7e5


def test_a_mistral_loads_with_equal_logits_and_its_window_bounds_the_context(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=200,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    theirs = MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path).max_position_embeddings == 200
    prompts = random_prompts([1, 7, 200])
    for prompt, got in zip(prompts, logits(load_model(tmp_path), prompts)):
        with torch.no_grad():
            assert torch.allclose(got, theirs(prompt[None]).logits[0], atol=1e-5, rtol=1e-5)
    # without a window the context is all of it
    edited(tmp_path, sliding_window=None)
    assert read_config(tmp_path).max_position_embeddings == 4096


def test_a_tied_base_that_stores_another_head_is_refused(tmp_path):
    config = small(True, None, None, 4)
    folder = save(random_model(config), tmp_path / "m")
    tensors = load_file(folder / SHARD)
    embedding = tensors["model.embed_tokens.weight"]
    index = folder / "model.safetensors.index.json"

    def store(head):
        save_file(tensors | {"lm_head.weight": head}, folder / SHARD, metadata={"format": "pt"})
        weight_map = dict.fromkeys([*tensors, "lm_head.weight"], SHARD)
        index.write_text(json.dumps({"weight_map": weight_map}))

    # the same matrix a second time is no other head
    store(embedding.clone())
    assert torch.equal(load_model(folder).lm_head.weight, embedding)
    store(embedding + 1)
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight"):
        SafetensorsWeights(folder, config)


def test_a_tied_head_is_counted_once():
    tied, untied = small(True, None, None, 4), small(False, None, None, 4)
    matrix = VOCAB * 64
    sizes = []
    for config in (tied, untied):
        sizes.append(sum(math.prod(shape) for shape in parameter_shapes(config).values()))
    assert sizes[1] - sizes[0] == matrix

    weights = []
    for config in (tied, untied):
        settings = TrainConfig(data="", model="", out="", dtype="float32", micro_tokens=256)
        parts = memory_parts(settings, config, ranks=1, state=OptimizerState("AdamW", 8))
        weights.append(parts["weights, fp32, sharded"]["none"])
    assert weights[1] - weights[0] == 4 * matrix
