"""Hugging Face directories in: config, weights, manifest.

A directory may be a stranger's, so everything in it is checked before it is used.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Config, Model, RopeScaling
from support.fields import Fields, file_in, read_fields, shown
from support.files import file_sha256
from tokenizer import TOKENIZER_FILES

# Fields of config.json, and the values under which model.py computes the same thing. Another value
# would be trained as if it were the first.
UNSUPPORTED = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "num_local_experts": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


# ---- config.json


def read_config(folder: str | Path) -> Config:
    """Config of a Hugging Face LLaMA directory. ValueError names the field that does not do."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; give a Hugging Face LLaMA directory")
    fields = read_fields(path)
    for field, allowed in UNSUPPORTED.items():
        value = fields.content.get(field, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(value) for value in allowed if value is not None)
            raise ValueError(
                f"{path}: {field} = {shown(value)} is not supported, only {choices or 'null'}"
            )
    heads = fields.whole("num_attention_heads", 1, MOST_HEADS)
    theta, scaling = rope_of(fields)
    config = Config(
        hidden_size=fields.whole("hidden_size", 1, MOST_WIDE),
        intermediate_size=fields.whole("intermediate_size", 1, MOST_WIDE),
        num_hidden_layers=fields.whole("num_hidden_layers", 1, MOST_LAYERS),
        num_attention_heads=heads,
        # directories as old as LLaMA-1 have a key-value head for each query head, and no field
        num_key_value_heads=fields.whole("num_key_value_heads", 1, MOST_HEADS, default=heads),
        vocab_size=fields.whole("vocab_size", 1, MOST_TOKENS),
        max_position_embeddings=context_of(fields),
        rms_norm_eps=fields.above_0("rms_norm_eps", 1),
        rope_theta=theta,
        head_dim=head_dim(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        rope_scaling=scaling,
    )
    if heads % config.num_key_value_heads:
        raise ValueError(
            f"{path}: num_attention_heads = {heads} is not a multiple of "
            f"num_key_value_heads = {config.num_key_value_heads}; {fields.remedy}"
        )
    return config


# The highest sizes that are believed: far above every LLaMA, and low enough that a broken file can
# neither fill the memory nor keep the program busy.
MOST_WIDE = 2**18
MOST_LAYERS = 1000
MOST_HEADS = 2**12
MOST_TOKENS = 2**24
# positions are counted in fp32, which tells whole numbers apart up to here
MOST_POSITIONS = 2**24
MOST_THETA = 1e12
MOST_FACTOR = 1e6


def context_of(fields: Fields) -> int:
    """How many tokens a conversation can have."""
    context = fields.whole("max_position_embeddings", 1, MOST_POSITIONS)
    # Within its window Mistral is LLaMA. Beyond it a token would not see all tokens before it.
    if fields.text("model_type", default="llama") == "mistral" and fields.has("sliding_window"):
        return min(context, fields.whole("sliding_window", 1, MOST_POSITIONS))
    return context


def head_dim(fields: Fields) -> int | None:
    """A head's width; None where it is hidden_size / num_attention_heads, which most have."""
    width = fields.whole("hidden_size", 1, MOST_WIDE)
    heads = fields.whole("num_attention_heads", 1, MOST_HEADS)
    if fields.has("head_dim"):
        size = fields.whole("head_dim", 1, MOST_WIDE)
    elif width % heads == 0:
        size = width // heads
    else:
        raise ValueError(
            f"{fields.place}: hidden_size = {width} is not a multiple of "
            f"num_attention_heads = {heads}; {fields.remedy}"
        )
    # RoPE rotates pairs
    if size % 2:
        raise ValueError(f"{fields.place}: head_dim = {size} is odd; {fields.remedy}")
    return None if size * heads == width else size


# ---- RoPE: transformers 4 has rope_theta and rope_scaling, 5 has both in rope_parameters


def rope_of(fields: Fields) -> tuple[float, RopeScaling | None]:
    """(rope_theta, Llama-3.1's scaling or None)."""
    theta = fields.above_0("rope_theta", MOST_THETA, default=None)
    scalings = {}
    for place in ("rope_scaling", "rope_parameters"):
        rope = fields.object(place, default=None)
        if rope is not None:
            scalings[place] = rope_scaling(rope)
            theta = rope.above_0("rope_theta", MOST_THETA, default=theta)
    if len(set(scalings.values())) > 1:
        raise ValueError(
            f"{fields.place}: rope_scaling is not as rope_parameters has it; {fields.remedy}"
        )

    if theta is None:
        print(f"{fields.place}: no rope_theta; taking 10000, LLaMA-2's", file=sys.stderr)
        theta = 10000.0
    return theta, next(iter(scalings.values()), None)


def rope_scaling(rope: Fields) -> RopeScaling | None:
    """What one of the two places says; None for the plain RoPE."""
    # older files have `type` for `rope_type`
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{rope.place}: {rope.within}rope_type = {shown(kind)} is not supported, "
            "only 'default' or 'llama3'"
        )
    low = rope.above_0("low_freq_factor", MOST_FACTOR)
    high = rope.above_0("high_freq_factor", MOST_FACTOR)
    if not low < high:
        raise ValueError(
            f"{rope.place}: {rope.within}low_freq_factor = {low} is not below "
            f"high_freq_factor = {high}; {rope.remedy}"
        )
    context = rope.whole("original_max_position_embeddings", 1, MOST_POSITIONS)
    return RopeScaling(rope.above_0("factor", MOST_FACTOR), low, high, context)


# ---- tokenizer


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer files of a directory, in the order in which to take them."""
    paths = [Path(folder) / name for name in TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]


def check_tokenizer(folder: str | Path, sha256: str, data: str) -> None:
    """ValueError: the base has a tokenizer, but not the one of this sha256, which the data have."""
    files = tokenizer_files(folder)
    if files and sha256 not in [file_sha256(path) for path in files]:
        raise ValueError(f"{files[0]} is not the tokenizer of {data}; prepare the data with it")


# ---- names and shapes of the parameters


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters, in their order; takes no memory."""
    with torch.device("meta"):
        model = Model(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# ---- sources of weights


class RandomWeights:
    """Fresh weights: norms 1, matrices normal with standard deviation 0.02 (as GPT-2's).

    The two matrices that feed the residual stream have 0.02 / sqrt(2 L): each of the L blocks adds
    to it twice. Like SafetensorsWeights this is a source of rows. A parameter's values depend on
    its name and the seed, not on who asks, so ranks and shards do not change them.
    """

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.seed = seed
        self.shapes = parameter_shapes(config)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of the parameter, fp32."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(stop - start)
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)

        # 7 bytes of a hash: every parameter has a seed of its own, and it fits 64 bits with a sign
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return (torch.randn(shape, generator=generator) * std)[start:stop]


class SafetensorsWeights:
    """The weights of a Hugging Face directory, by rows: one safetensors file, or many and an index.

    config is of the model to train. It may have more tokens than the files have rows: each added
    row of embed_tokens and lm_head is the mean of the file's rows, so `<|end_of_turn|>` starts as
    the average token. ValueError: what is missing, foreign or misshapen.

    tokens: ids that the training needs, though the base may never have seen them, as Llama-3 has
    its `<|eot_id|>`. One whose embedding is nearly 0 was never trained: its rows of the embedding
    and of the head become the mean of the first `ordinary` rows. `untrained` has these ids.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Config,
        tokens: Sequence[int] = (),
        ordinary: int | None = None,
    ):
        folder = Path(folder)
        file_config = read_config(folder)
        self.shapes = parameter_shapes(config)
        names = weight_files(folder)
        # {tensor: the open file that has it}; a tensor is read when its rows are asked for
        self.files = {}
        for name in names:
            file = open_weights(folder, name)
            for key in file.keys():
                # a table that old directories hold, and that model.py computes
                if not key.endswith("rotary_emb.inv_freq"):
                    self.files[key] = file
        if config.tie_word_embeddings:
            self.forget_tied_head(folder)

        expected = parameter_shapes(dataclasses.replace(config, vocab_size=file_config.vocab_size))
        for key in sorted(expected.keys() | self.files.keys()):
            if key not in self.files:
                raise ValueError(f"{folder}: no tensor {key} in {', '.join(names)}")
            if key not in expected:
                raise ValueError(
                    f"{folder}: tensor {key} is no part of the model that config.json describes"
                )
            slice_ = self.files[key].get_slice(key)
            shape, dtype = slice_.get_shape(), slice_.get_dtype()
            if tuple(shape) != expected[key]:
                raise ValueError(
                    f"{folder}: {key} is {shape}, config.json says {list(expected[key])}"
                )
            if dtype not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{folder}: {key} is stored as {dtype}; F32, F16 and BF16 are read"
                )

        self.ordinary = ordinary
        self.untrained = []
        if tokens:
            name = "model.embed_tokens.weight"
            self.untrained = untrained_rows(self.files[name].get_slice(name), tokens)

    def forget_tied_head(self, folder: Path) -> None:
        """A tied model's files may store the head, too. ValueError: as another matrix."""
        head = self.files.pop("lm_head.weight", None)
        if head is None:
            return
        if "model.embed_tokens.weight" not in self.files:
            raise ValueError(
                f"{folder}: no tensor model.embed_tokens.weight; fetch the files again"
            )
        theirs = head.get_tensor("lm_head.weight")
        embedding = self.files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
        if not torch.equal(theirs, embedding):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding; "
                "set it to false in config.json, or fetch the files again"
            )

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of the parameter, fp32."""
        slice_ = self.files[name].get_slice(name)
        in_file = slice_.get_shape()[0]
        parts = []
        if start < in_file:
            parts.append(slice_[start : min(stop, in_file)].float())
        # only embed_tokens and lm_head can be short of rows: the constructor has checked
        if stop > in_file:
            added = stop - max(start, in_file)
            parts.append(mean_row(slice_, in_file).expand(added, -1))
        rows = torch.cat(parts)

        mine = [i for i in self.untrained if start <= i < stop]
        if mine and name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean_D = mean_row(slice_, self.ordinary or in_file)
            for i in mine:
                rows[i - start] = mean_D
        return rows


def weight_files(folder: Path) -> list[str]:
    """Names of the directory's safetensors files."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = read_fields(index).object("weight_map")
    names = {weight_map.text(tensor) for tensor in weight_map.content}
    if not names:
        raise ValueError(f"{index}: an empty weight_map; fetch the file again")
    for name in names:
        file_in(folder, name, index)
    return sorted(names)


def open_weights(folder: Path, name: str):
    """A safetensors file, open and mapped; ValueError where there is none."""
    if not (folder / name).is_file():
        raise ValueError(
            f"{folder}: no {name}; model.py reads safetensors (convert a .bin with transformers)"
        )
    try:
        return safe_open(folder / name, "pt")
    except SafetensorError as error:
        raise ValueError(f"{folder / name}: {error}; fetch the file again") from None


# A row this much shorter than usual was never trained, like those of Llama-3's base for the tokens
# that only its chat model uses.
UNTRAINED = 1e-3


def untrained_rows(slice_, tokens: Sequence[int]) -> list[int]:
    """Those of the tokens whose rows of the stored embedding are nearly 0."""
    stored = [i for i in tokens if i < slice_.get_shape()[0]]
    # any few hundred rows tell how long a row is
    usual = slice_[:512].float().norm(dim=1).median()
    return [i for i in stored if slice_[i : i + 1].float().norm() < UNTRAINED * usual]


def mean_row(slice_, rows: int) -> torch.Tensor:
    """The mean of the first rows of a stored matrix, fp32 [width], summed in fp64.

    The sum is added up as the rows are read. Partial sums kept in a list would hold on to holes of
    the allocator: 100 MB of them for Llama-2.
    """
    _, width = slice_.get_shape()
    sum_D = torch.zeros(width, dtype=torch.float64)
    for start in range(0, rows, 512):
        sum_D += slice_[start : min(start + 512, rows)].double().sum(0)
    return (sum_D / rows).float()


# ---- into a model


def whole(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What `local_rows` of support/ranks.py is to a sharded model, without ranks: all rows."""
    return parameter, 0


@torch.no_grad()
def load_weights(model: Model, source, rows_of=whole) -> None:
    """Fill every parameter from the source, a RandomWeights or SafetensorsWeights.

    rows_of(parameter) -> (the rows to fill here, index of the first): all of them, or those of this
    rank (`local_rows` in support/ranks.py).
    """
    for name, parameter in model.named_parameters():
        local, start = rows_of(parameter)
        if local.numel():
            local.copy_(source.rows(name, start, start + len(local)))


def load_model(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model of a Hugging Face directory, ready to sample. Its manifest is verified."""
    check_manifest(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    # in this order: the device never holds it in fp32
    model.to(dtype).to_empty(device=device)
    model.tie()
    load_weights(model, SafetensorsWeights(folder, config))
    return model.eval().requires_grad_(False)


def check_manifest(folder: str | Path) -> None:
    """ValueError names the first file that is not as manifest.json has it.

    For a directory without a manifest, and for files that it does not list, a line is printed.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        print(f"{folder}: no manifest.json, files not verified", file=sys.stderr)
        return
    listed = read_fields(path).content
    for name, entry in listed.items():
        file = file_in(folder, name, path)
        if not is_as_listed(file, entry):
            raise ValueError(
                f"{file}: missing or not as manifest.json has it; fetch or export "
                "the directory again"
            )
    # a tokenizer that was put there later, for one
    unlisted = not_listed(folder, files_read(folder))
    if unlisted:
        names = ", ".join(unlisted)
        print(f"{path}: does not list {names}; not verified", file=sys.stderr)


def not_listed(folder: Path, names: list[str]) -> list[str]:
    """Those of the names that the directory's manifest.json does not list."""
    listed = read_fields(folder / "manifest.json").content
    return [name for name in names if name not in listed]


def files_read(folder: Path) -> list[str]:
    """Names of the files of a directory that decide what the model says."""
    names = ["config.json", "crlft.json", "tokenizer_config.json", *TOKENIZER_FILES]
    names += ["model.safetensors.index.json", *weight_files(folder)]
    return [name for name in names if (folder / name).is_file()]


def model_digest(folder: str | Path) -> str:
    """A sha256 that changes with any file that decides what the model says.

    It is that of the manifest, where that lists all of them. Else the files speak for themselves.
    """
    folder = Path(folder)
    manifest = folder / "manifest.json"
    names = files_read(folder)
    if manifest.is_file():
        names = not_listed(folder, names)
        if not names:
            return file_sha256(manifest)
        names = ["manifest.json", *names]
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def is_as_listed(file: Path, entry: dict) -> bool:
    """Whether the file has the bytes and sha256 of its entry; the cheap question comes first."""
    if not isinstance(entry, dict) or not file.is_file():
        return False
    if file.stat().st_size != entry.get("bytes"):
        return False
    return file_sha256(file) == entry.get("sha256")
