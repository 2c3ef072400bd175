"""Hugging Face directories out: weights, config, tokenizer with its chat template, manifest."""

import base64
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from conversations import role_texts
from support.files import sha256
from support.hf import SafetensorsWeights, check_manifest, parameter_shapes
from support.ranks import barrier, local_rows, rank
from tokenizer import EOT


def config_json(config, dtype, bos_id, eos_id):
    """config.json as transformers 4 and 5 and vLLM read it: both spell rope and dtype their own way."""
    dtype = str(dtype).removeprefix("torch.")
    return dataclasses.asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "head_dim": config.head_dim,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def write_weights(folder, config, tensors, dtype, write=True, shard_bytes=5 * 2**30):
    """Write (name, tensor) pairs as model-0000i-of-0000n.safetensors and index, a shard in memory at a time.

    tensors comes in the order of named_parameters. Under FSDP every rank iterates (each pair is a collective), one writes.
    """
    size = {
        name: math.prod(shape) * dtype.itemsize for name, shape in parameter_shapes(config).items()
    }
    file_of, number, filled = {}, 1, 0
    for name in size:
        if filled and filled + size[name] > shard_bytes:
            number, filled = number + 1, 0
        file_of[name], filled = number, filled + size[name]
    file_of = {name: f"model-{i:05d}-of-{number:05d}.safetensors" for name, i in file_of.items()}
    shard = {}
    for name, tensor in tensors:
        if write:
            shard[name] = tensor.detach().to("cpu", dtype).contiguous()
            if len(shard) == list(file_of.values()).count(file_of[name]):
                save_file(shard, Path(folder) / file_of[name], metadata={"format": "pt"})
                shard = {}
        del tensor
    if write:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": file_of}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_manifest(folder):
    """manifest.json: {file: {bytes, sha256}} of all that stands in the folder."""
    files = sorted(p for p in Path(folder).iterdir() if p.name != "manifest.json")
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest, indent=1))


def chat_template(template, condition):
    """The Jinja form of `encode`, from the same table, for transformers and vLLM."""
    user, assistant, opening = role_texts(template, condition)
    # a JSON string is a Jinja string, whatever the condition holds
    text = lambda x: json.dumps(x, ensure_ascii=False)
    return (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + "
        + text(EOT)
        + " }}{% endif %}"
        + ("{{ " + text(opening + EOT) + " }}" if opening else "")
        + "{% for m in messages %}"
        + "{% if m['role'] == 'user' %}{{ "
        + text(user + " ")
        + " + m['content'] + "
        + text(EOT)
        + " }}"
        + "{% elif m['role'] == 'assistant' %}{{ "
        + text(assistant + " ")
        + " + m['content'] + "
        + text(EOT)
        + " }}"
        + "{% elif not loop.first %}{{ raise_exception('a system message stands first') }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ "
        + text(assistant)
        + " }}{% endif %}"
    )


def tokenizer_json(tokenizer):
    """tokenizer.json for the `tokenizers` library: the sentencepiece vocabulary, and the merges that its scores imply.

    Sentencepiece's BPE joins the neighbours whose union has the best score; a merge list says the same thing as pairs in
    order of that score, every way to cut a piece in two being a pair.
    """
    sp, size = tokenizer.sp, tokenizer.eot
    pieces = [sp.id_to_piece(i) for i in range(size)]
    normal = [i for i in range(size) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = [sp.get_score(i) for i in normal]
    known, merges = {pieces[i] for i in normal}, []
    for i, score in zip(normal, scores):
        cuts = [(pieces[i][:k], pieces[i][k:]) for k in range(1, len(pieces[i]))]
        merges += [(-score, -len(a), -len(b), a, b) for a, b in cuts if a in known and b in known]
    # equal scores (Llama-2's runs of spaces): the longest left part first, as joining from the left
    # gives it
    merges.sort()
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    added = [(i, pieces[i]) for i in special] + [(size, EOT)]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    bos = pieces[tokenizer.bos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text} | flags for i, text in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(map(sp.is_byte, range(size))),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{a} {b}" for *_, a, b in merges],
        },
    }


def write_tokenizer(folder, tokenizer, meta):
    """tokenizer.model, tokenizer.json, tokenizer_config.json (with the expert's chat template) and crlft.json of an export."""
    folder, sp = Path(folder), tokenizer.sp
    names = {
        f"{kind}_token": sp.id_to_piece(i)
        for kind, i in (("bos", tokenizer.bos), ("eos", tokenizer.eos), ("unk", sp.unk_id()))
    }
    json_ = tokenizer_json(tokenizer)
    added = {str(t["id"]): {key: t[key] for key in t if key != "id"} for t in json_["added_tokens"]}
    expert = next(c for c in meta["classes"] if c["name"] == meta["expert"])
    # The general class takes tokenizer.json as it stands. LlamaTokenizer of transformers 5 puts a
    # rule of its own in place of ours (a text that starts with a space loses one); legacy says to
    # older readers that a space follows a special token.
    config = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": meta["max_len"],
        "added_tokens_decoder": added,
        "additional_special_tokens": [EOT],
        "chat_template": chat_template(meta["template"], expert["condition"]),
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.bytes)
    for name, content in (
        ("tokenizer.json", json_),
        ("tokenizer_config.json", config),
        ("crlft.json", meta),
    ):
        (folder / name).write_text(
            json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"
        )


def export(folder, model, model_config, data, dtype):
    """Write the Hugging Face directory, read it back, compare every value, then give it its name."""
    unfinished, first, tokenizer = (
        folder.with_name("hf.partial"),
        rank() == 0,
        data.tokenizer,
    )
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    try:
        whole = (
            (name, p.full_tensor() if hasattr(p, "full_tensor") else p)
            for name, p in model.named_parameters()
        )
        write_weights(unfinished, model_config, whole, dtype, write=first)
        if first:
            generation = {
                "bos_token_id": tokenizer.bos,
                "eos_token_id": [tokenizer.eot, tokenizer.eos],
            }
            for name, content in (
                ("config.json", config_json(model_config, dtype, tokenizer.bos, tokenizer.eos)),
                ("generation_config.json", generation),
            ):
                (unfinished / name).write_text(json.dumps(content, indent=1))
            # first user messages by 32 bits of their hash: evaluate.py asks what was trained on
            prompts = np.unique(data.group).astype(np.uint32)
            write_tokenizer(
                unfinished,
                tokenizer,
                data.meta | {"prompts": base64.b64encode(prompts.tobytes()).decode()},
            )
            write_manifest(unfinished)
            check_manifest(unfinished)
        barrier()
        written = SafetensorsWeights(unfinished, model_config)
        for name, parameter in model.named_parameters():
            local, start = local_rows(parameter)
            if local.numel():
                same = torch.equal(
                    written.rows(name, start, start + len(local)),
                    local.detach().to("cpu", dtype).float(),
                )
                assert same, f"{folder}: {name} reads back other values than were written"
        barrier()
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
