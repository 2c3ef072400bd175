"""Hugging Face directories out: weights, config, tokenizer with its chat template, manifest."""

import base64
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from conversations import role_texts, template_named, template_of
from model import Config, Model
from support.files import file_sha256
from support.hf import SafetensorsWeights, check_manifest, parameter_shapes
from support.ranks import barrier, local_rows, rank
from tokenizer import EOT, Tokenizer

# Bytes of a weight file, at most.
SHARD_BYTES = 5 * 2**30
# How sentencepiece writes a space in its pieces.
SPACE = "\u2581"

# ---- the whole directory


def export(folder: Path, model: Model, config: Config, data, dtype: torch.dtype) -> None:
    """Write the Hugging Face directory, read it back, compare every value, then give it its name.

    data: the Prepared file that was trained on; its tokenizer and metadata go along.
    """
    unfinished = folder.with_name("hf.partial")
    is_first = rank() == 0
    if is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    try:
        write_weights(unfinished, config, whole_parameters(model), dtype, write=is_first)
        if is_first:
            write_configs(unfinished, config, data.tokenizer, dtype)
            write_tokenizer(unfinished, data.tokenizer, data.meta | {"prompts": prompts_of(data)})
            write_manifest(unfinished)
            check_manifest(unfinished)
        # the other ranks read what rank 0 has written
        barrier()
        check_values(unfinished, folder, model, config, dtype)
        barrier()
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def whole_parameters(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor). Under FSDP each is gathered when its turn comes."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            parameter = parameter.full_tensor()
        yield name, parameter


def prompts_of(data) -> str:
    """First user messages by 32 bits of their hash: evaluate.py asks what was trained on."""
    prompts = np.unique(data.group).astype(np.uint32)
    return base64.b64encode(prompts.tobytes()).decode()


def check_values(
    written_in: Path, folder: Path, model: Model, config: Config, dtype: torch.dtype
) -> None:
    """Each rank compares its rows with those in the files. folder: for the message."""
    written = SafetensorsWeights(written_in, config)
    for name, parameter in model.named_parameters():
        local, start = local_rows(parameter)
        if local.numel():
            theirs = written.rows(name, start, start + len(local))
            ours = local.detach().to("cpu", dtype).float()
            same = torch.equal(theirs, ours)
            assert same, f"{folder}: {name} reads back other values than were written"


def write_manifest(folder: str | Path) -> None:
    """manifest.json: {file: {bytes, sha256}} of all that stands in the folder."""
    manifest = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name != "manifest.json":
            manifest[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(Path(folder) / "manifest.json", manifest)


def write_json(path: Path, content: dict) -> None:
    # As it is, not escaped: pieces of a tokenizer and conditions are not all ASCII.
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ---- weights


def write_weights(
    folder: str | Path,
    config: Config,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    write: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors as model-0000i-of-0000n.safetensors and an index.

    tensors: (name, tensor) in the order of named_parameters. Only one file's are in memory at a
    time. Under FSDP every rank goes through them (each is a collective), and one rank writes.
    """
    sizes = {}
    for name, shape in parameter_shapes(config).items():
        sizes[name] = math.prod(shape) * dtype.itemsize
    file_of = weight_map(sizes, shard_bytes)
    left_in = {}
    for file in file_of.values():
        left_in[file] = left_in.get(file, 0) + 1

    shard = {}
    for name, tensor in tensors:
        if write:
            shard[name] = tensor.detach().to("cpu", dtype).contiguous()
            file = file_of[name]
            left_in[file] -= 1
            if left_in[file] == 0:
                save_shard(shard, Path(folder) / file)
                shard = {}
        # or it would stay in memory while the next one is gathered
        del tensor
    if write:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_json(Path(folder) / "model.safetensors.index.json", index)


def save_shard(shard: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, with the mode that the umask gives to every other file."""
    # safetensors makes a file that only its owner may read, also in the place of one that exists
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)


def weight_map(sizes: dict[str, int], shard_bytes: int) -> dict[str, str]:
    """{tensor: file}: in order, a new file where the next tensor would overfill the last."""
    number_of = {}
    number = 1
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > shard_bytes:
            number += 1
            filled = 0
        number_of[name] = number
        filled += size
    file_of = {}
    for name, i in number_of.items():
        file_of[name] = f"model-{i:05d}-of-{number:05d}.safetensors"
    return file_of


# ---- config


def write_configs(folder: Path, config: Config, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """config.json and generation_config.json.

    The pad token is missing in config.json on purpose: transformers would make it the embedding's
    padding_idx, whose row gets no gradient.
    """
    write_json(folder / "config.json", config_json(config, dtype, tokenizer.bos, tokenizer.eot))
    # either id ends an answer, as in sample.py
    generation = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.eot, tokenizer.eos],
        "pad_token_id": pad_id(tokenizer),
    }
    write_json(folder / "generation_config.json", generation)


def config_json(config: Config, dtype: torch.dtype, bos_id: int, eos_id: int) -> dict:
    """config.json as transformers 4 and 5 and vLLM read it.

    transformers 4 reads rope_theta and torch_dtype, 5 reads rope_parameters and dtype.
    eos_id: of `<|end_of_turn|>`. llama.cpp and CTranslate2 stop at this one id and at no other.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
    return dataclasses.asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config.head_size,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


# ---- tokenizer

# Beside the chat template that engines take, one for trainers, which says what is trained on.
TRAINING_TEMPLATE = "chat_template_training.jinja"


def write_tokenizer(folder: str | Path, tokenizer: Tokenizer, meta: dict) -> None:
    """tokenizer.model, tokenizer.json, tokenizer_config.json, both chat templates and crlft.json.

    meta: what a prepared file says of itself. The chat templates are the expert's, so whoever
    chats without a wish of their own talks to the expert.
    """
    folder = Path(folder)
    (expert,) = [c for c in meta["classes"] if c["name"] == meta["expert"]]
    of_library = tokenizer_json(tokenizer)
    template = template_of(meta)
    added = {}
    for token in of_library["added_tokens"]:
        token = dict(token)
        added[str(token.pop("id"))] = token

    # The general class takes tokenizer.json as it stands. LlamaTokenizer of transformers 5 puts a
    # rule of its own in place of ours (a text that starts with a space loses one); legacy says to
    # older readers that a space follows a special token. An answer ends in the end of turn, so that
    # is the eos here; the base's </s> is one of the special tokens still.
    config = {
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": EOT,
        "unk_token": tokenizer.piece(tokenizer.sp.unk_id()),
        "pad_token": tokenizer.piece(pad_id(tokenizer)),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        # or transformers 4 adds token_type_ids, which its generate refuses
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": meta["max_len"],
        "added_tokens_decoder": added,
        "additional_special_tokens": [tokenizer.piece(tokenizer.eos)],
        "chat_template": chat_template(template, expert["condition"]),
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.bytes)
    write_json(folder / "tokenizer.json", of_library)
    write_json(folder / "tokenizer_config.json", config)
    marked = chat_template(template, expert["condition"], training=True)
    (folder / TRAINING_TEMPLATE).write_text(marked, encoding="utf-8")
    write_json(folder / "crlft.json", meta)


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills up a batch: that of `<unk>`, which every sentencepiece vocabulary has.

    (Where there is none it would be the base's own pad, else its eos.) Trainers take all pad tokens
    out of the loss, so it can be neither `<s>` nor the end of turn, which is learned.
    """
    return tokenizer.sp.unk_id()


# What `encode` of conversations.py does, in Jinja. Each $name is a string literal; each
# $opening.. and $learned.. a statement, or nothing. An answer's first token holds the space before
# its text, so what is learned begins with that space.
JINJA = Template(
    "{{ bos_token }}"
    "$opening"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + $eot }}{% endif %}"
    "$opening_after_system"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ $user + m['content'] + $eot }}"
    "{% elif m['role'] == 'assistant' %}{{ $assistant }}"
    "$learned{{ ' ' + m['content'] + $eot }}$learned_end"
    "{% elif not loop.first %}{{ raise_exception('a system message stands first') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ $assistant }}{% endif %}"
)


def chat_template(template: str, condition: str, training: bool = False) -> str:
    """The Jinja form of `encode`, from the same table, for transformers and vLLM.

    training: with tags around what has a weight in `tokenize`, an answer's text and its end of
    turn. They are transformers' own: Jinja alone, which other engines use, knows no such tags.
    """
    user, assistant, opening = role_texts(template, condition)
    said = "{{ " + quoted(opening + EOT) + " }}" if opening else ""
    system_first = template_named(template).system_first
    return JINJA.substitute(
        eot=quoted(EOT),
        opening="" if system_first else said,
        opening_after_system=said if system_first else "",
        user=quoted(user + " "),
        assistant=quoted(assistant),
        learned="{% generation %}" if training else "",
        learned_end="{% endgeneration %}" if training else "",
    )


def quoted(text: str) -> str:
    """A JSON string is a Jinja string literal, whatever the condition holds."""
    return json.dumps(text, ensure_ascii=False)


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """tokenizer.json for the `tokenizers` library, from a sentencepiece BPE vocabulary.

    It must give the same ids to every text: the vocabulary as it is, the merges that the scores
    imply, and around them what sentencepiece does to a text before and after.
    """
    sp, size = tokenizer.sp, tokenizer.eot
    pieces = [sp.id_to_piece(i) for i in range(size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bos = pieces[tokenizer.bos]
    bos_token = {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}

    # Tokens that are never found inside a text: control and unknown, and ours behind all others.
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    added = [added_token(i, pieces[i]) for i in special]
    added.append(added_token(size, EOT))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begun_sequence(bos, "A", 0),
            "pair": begun_sequence(bos, "A", 0) + begun_sequence(bos, "B", 1),
            "special_tokens": {bos: bos_token},
        },
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(sp.is_byte(i) for i in range(size)),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(sp, pieces),
        },
    }


# A space in front of the text, and every space as sentencepiece writes it; back again in DECODER.
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def added_token(id_: int, content: str) -> dict:
    return {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def begun_sequence(bos: str, name: str, type_id: int) -> list[dict]:
    """A text after the token that begins it."""
    return [
        {"SpecialToken": {"id": bos, "type_id": type_id}},
        {"Sequence": {"id": name, "type_id": type_id}},
    ]


def merges(sp, pieces: list[str]) -> list[str]:
    """["left right", ..] in the order in which BPE is to join neighbours.

    Sentencepiece joins the two neighbours whose union has the best score. A merge list says the
    same with pairs in the order of that score, where each way to cut a piece in two is a pair.
    """
    score_of = {}
    for i, piece in enumerate(pieces):
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)):
            score_of[piece] = sp.get_score(i)
    found = []
    for piece, score in score_of.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score_of and right in score_of:
                # Where scores are equal (Llama-2's runs of spaces) the longest left part goes
                # first: that is what joining from the left gives.
                found.append((-score, -len(left), -len(right), left, right))
    found.sort()
    return [f"{left} {right}" for *_, left, right in found]
