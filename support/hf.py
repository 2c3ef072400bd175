"""Hugging Face directories in: config, weights, manifest."""

import dataclasses
import hashlib
import math
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Config, Model
from support.files import read_json, sha256

UNSUPPORTED = {  # field of config.json: the values under which this file computes the same thing
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def read_config(folder):
    """Config of a Hugging Face LLaMA directory. ValueError names the field that model.py does not compute."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; give a Hugging Face LLaMA directory")
    fields = read_json(path)
    rope = fields.get("rope_parameters") or {}  # transformers 5; 4 has rope_theta at the top level
    for field, allowed in UNSUPPORTED.items():
        if fields.get(field) not in allowed and field in fields:
            raise ValueError(
                f"{path}: {field} = {fields[field]!r} is not supported, only {allowed[0]!r}"
            )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{path}: rope_parameters.rope_type = {rope['rope_type']!r} is not supported, only 'default'"
        )
    fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta"))
    if fields["rope_theta"] is None:
        print(f"{path}: no rope_theta; taking 10000, LLaMA-2's", file=sys.stderr)
        fields["rope_theta"] = 10000.0
    if fields.get("num_key_value_heads") is None:  # as old as LLaMA-1
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    names = [field.name for field in dataclasses.fields(Config)]
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{path}: no {missing[0]}; add the field")
    for field in dataclasses.fields(Config):
        value = fields[field.name]
        if not isinstance(value, (int, field.type)) or not value > 0:
            raise ValueError(
                f"{path}: {field.name} = {value!r} is not {'a whole number' if field.type is int else 'a number'} above 0; fetch the file again"
            )
    config = Config(**{name: fields[name] for name in names})
    if fields.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim = {fields['head_dim']} is not supported, only hidden_size / num_attention_heads"
        )
    for a, b in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if fields[a] % fields[b]:
            raise ValueError(f"{path}: {a} = {fields[a]} is not a multiple of {b} = {fields[b]}")
    return config


def parameter_shapes(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Model(config).named_parameters()}


class RandomWeights:
    """Fresh weights: norms 1, matrices normal(0, 0.02), the two that feed the residual stream scaled by 1 / sqrt(2 L).

    Like SafetensorsWeights a source of rows. A parameter's values depend on its name and the seed, not on who asks.
    """

    def __init__(self, config, seed):
        self.config, self.seed, self.shapes = config, seed, parameter_shapes(config)

    def rows(self, name, start, stop):
        """Rows start to stop of the parameter, fp32."""
        if len(self.shapes[name]) == 1:
            return torch.ones(stop - start)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
        return (torch.randn(self.shapes[name], generator=generator) * std)[start:stop]


class SafetensorsWeights:
    """The weights of a Hugging Face directory (one safetensors file, or many and an index), read by rows.

    config is the one to train: with more tokens than the files have rows, each added row of embed_tokens and lm_head is the
    mean of the file's (`<|end_of_turn|>` starts as the average token). ValueError: what is missing, foreign or misshapen.
    """

    def __init__(self, folder, config):
        folder, self.files = Path(folder), {}
        self.shapes, file_vocab = parameter_shapes(config), read_config(folder).vocab_size
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(
                isinstance(name, str) for name in files.values()
            ):
                raise ValueError(
                    f"{index}: no weight_map of tensors to files; fetch the file again"
                )
            names = sorted(set(files.values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder}: no {name}; model.py reads safetensors (convert a .bin with transformers)"
                )
            try:
                file = safe_open(folder / name, "pt")
            except SafetensorError as error:
                raise ValueError(f"{folder / name}: {error}; fetch the file again") from None
            self.files |= {
                key: file for key in file.keys() if not key.endswith("rotary_emb.inv_freq")
            }
        shapes = parameter_shapes(dataclasses.replace(config, vocab_size=file_vocab))
        for key in sorted(shapes.keys() | self.files.keys()):
            if key not in self.files:
                raise ValueError(f"{folder}: no tensor {key} in {', '.join(names)}")
            if key not in shapes:
                raise ValueError(
                    f"{folder}: tensor {key} is no part of the model that config.json describes"
                )
            slice_ = self.files[key].get_slice(key)
            if tuple(slice_.get_shape()) != shapes[key]:
                raise ValueError(
                    f"{folder}: {key} is {slice_.get_shape()}, config.json says {list(shapes[key])}"
                )
            if slice_.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{folder}: {key} is stored as {slice_.get_dtype()}; F32, F16 and BF16 are read"
                )

    def rows(self, name, start, stop):
        """Rows start to stop of the parameter, fp32."""
        slice_ = self.files[name].get_slice(name)
        have = slice_.get_shape()[0]
        parts = [slice_[start : min(stop, have)].float()] if start < have else []
        if stop > have:  # only the two V x D tensors can be short: the constructor checked
            sum_D = torch.zeros(slice_.get_shape()[1], dtype=torch.float64)
            # added up as it goes: results kept in a list would pin the allocator's holes, 100 MB of
            # them
            for i in range(0, have, 512):
                sum_D += slice_[i : i + 512].double().sum(0)
            parts.append((sum_D / have).float().expand(stop - max(start, have), -1))
        return torch.cat(parts)


@torch.no_grad()
def load_weights(model, source, shard=lambda parameter: (parameter, 0)):
    """Fill every parameter from the source. `shard(parameter)` -> (the local rows, the first one's index); train.py's knows FSDP."""
    for name, parameter in model.named_parameters():
        local, start = shard(parameter)
        if local.numel():
            local.copy_(source.rows(name, start, start + len(local)))


def load_model(folder, device="cpu", dtype=torch.float32):
    """The model of a Hugging Face directory, ready to sample; its manifest is verified when there is one."""
    check_manifest(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    model.to(dtype).to_empty(device=device)  # in this order: never fp32 on the device
    load_weights(model, SafetensorsWeights(folder, config))
    return model.eval().requires_grad_(False)


def check_manifest(folder):
    """ValueError names the first file that is not as manifest.json has it; a directory without one is said."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return print(f"{folder}: no manifest.json, files not verified", file=sys.stderr)
    for name, entry in read_json(path).items():
        file = path.with_name(name)
        entry = entry if isinstance(entry, dict) else {}
        if (
            not file.is_file()
            or os.path.getsize(file) != entry.get("bytes")
            or sha256(file) != entry.get("sha256")
        ):
            raise ValueError(
                f"{file}: missing or not as manifest.json has it; fetch or export the directory again"
            )
