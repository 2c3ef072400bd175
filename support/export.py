"""Hugging Face directories out: weights, config, manifest; the tokenizer: export_tokenizer.py."""

import base64
import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model import Config, Model
from support.export_tokenizer import write_tokenizer
from support.files import file_sha256, write_json
from support.hf import SafetensorsWeights, check_manifest, parameter_shapes
from support.ranks import barrier, is_finite, local_rows, rank
from tokenizer import Tokenizer

# Bytes of a weight file, at most.
SHARD_BYTES = 5 * 2**30

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
    except (OSError, ValueError, SafetensorError):
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
        # on every rank, so that all stop
        if not is_finite(tensor, dtype):
            raise ValueError(
                f"{name} is not finite in {dtype}, so nothing is exported; lower --lr, under a new "
                "--out"
            )
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
    try:
        save_file(shard, path, metadata={"format": "pt"})
    # names no file
    except SafetensorError as error:
        raise ValueError(
            f"{path} could not be written ({error}); free space or choose another folder"
        ) from None
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
    # Either id ends an answer, and tokens are drawn, as in sample.py with its defaults. top_k 0:
    # from all; without it transformers would draw from the 50 likeliest.
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.eot, tokenizer.eos],
        "pad_token_id": tokenizer.pad,
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
