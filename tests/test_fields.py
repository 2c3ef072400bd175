"""JSON files that somebody else wrote or a disk has broken: place, value and remedy in one line."""

import functools
import json

import pytest

from model import Config, Model
from support.export import config_json, write_manifest, write_weights
from support.fields import file_in, parse_object, read_fields
from support.files import file_sha256
from support.hf import check_manifest, model_digest, read_config, weight_files
from tokenizer import special_names_beside
from train import base_sha256


@pytest.fixture
def folder(tmp_path):
    """A small directory, with a manifest."""
    import torch

    config = Config(16, 24, 2, 2, 1, vocab_size=11)
    torch.manual_seed(0)
    model = Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    fields = config_json(config, torch.float32, 1, 2)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_weights(tmp_path, config, model.named_parameters(), torch.float32)
    write_manifest(tmp_path)
    return tmp_path


def refusal(function, *args):
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as error:
        function(*args)
    line = str(error.value)
    assert "\n" not in line
    return line


def edited(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        ('{"a": "\\ud800"}', "half of a character"),
        ("7", "not a JSON object"),
        ("", "not JSON"),
    ],
)
def test_what_is_no_object(text, why):
    line = refusal(parse_object, text.encode(), "x.json")
    assert line.startswith("x.json: not ")
    assert why in line


def test_bytes_that_are_not_utf8():
    assert "x.json: not JSON" in refusal(parse_object, b'{"a": "\xff"}', "x.json")
    # json.loads would take it for UTF-16
    assert "x.json: not JSON" in refusal(parse_object, '{"a": 1}'.encode("utf-16"), "x.json")


@pytest.mark.parametrize(
    "field, value, wanted",
    [
        ("num_hidden_layers", 10**30, "a whole number from 1 to 1,000"),
        ("num_hidden_layers", 2.5, "a whole number"),
        ("num_hidden_layers", True, "a whole number"),
        ("hidden_size", 10**200, "a number of more than 80 digits is not"),
        ("vocab_size", -1, "a whole number"),
        ("rms_norm_eps", float("nan"), "a number above 0"),
        ("rms_norm_eps", "1e-5", "a number above 0"),
        ("rope_theta", float("inf"), "a number above 0"),
        ("rope_parameters", "default", "an object"),
        ("rope_parameters", {"rope_type": 3}, "rope_parameters.rope_type = 3 is not a text"),
        ("head_dim", {"a": "x" * 1000}, ".. is not a whole number"),
        ("tie_word_embeddings", 1.5, "is not true or false"),
    ],
)
def test_a_config_of_another_kind_or_size(folder, field, value, wanted):
    edited(folder / "config.json", **{field: value})
    line = refusal(read_config, folder)
    assert f"config.json: {field}" in line
    assert wanted in line
    assert len(line) < 300 + len(str(folder))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b"])
def test_no_list_of_files_leads_out_of_its_folder(folder, name):
    assert "not the name of a file beside it" in refusal(file_in, folder, name, "list.json")
    entry = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps({name: entry}))
    assert "manifest.json" in refusal(check_manifest, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "index.json" in refusal(weight_files, folder)


def test_an_index_that_lists_nothing(folder):
    index = folder / "model.safetensors.index.json"
    for content, why in (
        ({}, "no weight_map"),
        ({"weight_map": {}}, "empty"),
        ({"weight_map": {"a": 1}}, "weight_map.a = 1 is not a text"),
        ({"weight_map": ["a"]}, "is not an object"),
    ):
        index.write_text(json.dumps(content))
        assert why in refusal(weight_files, folder)


def test_what_a_manifest_does_not_list_is_said(folder, capsys):
    check_manifest(folder)
    assert capsys.readouterr().err == ""
    (folder / "tokenizer.model").write_bytes(b"put there later")
    check_manifest(folder)
    assert "does not list tokenizer.model; not verified" in capsys.readouterr().err
    (folder / "manifest.json").write_text("{}")
    check_manifest(folder)
    said = capsys.readouterr().err
    assert "does not list config.json, tokenizer.model, model.safetensors.index.json" in said


def test_no_flipped_bit_of_a_manifest_is_taken(folder, monkeypatch):
    """Every bit of it: nothing may be left unverified, in silence or not."""
    # the files stay as they are, so each is hashed once
    monkeypatch.setattr("support.hf.file_sha256", functools.cache(file_sha256))
    path = folder / "manifest.json"
    good = path.read_bytes()
    check_manifest(folder)
    for i in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[i // 8] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        refusal(check_manifest, folder)
    path.write_bytes(good)
    check_manifest(folder)


def test_the_digest_of_a_model_changes_with_its_files(folder):
    with_manifest = model_digest(folder)
    (folder / "manifest.json").unlink()
    without = model_digest(folder)
    assert without == model_digest(folder) != with_manifest
    edited(folder / "config.json", rms_norm_eps=1e-6)
    assert model_digest(folder) != without


@pytest.mark.parametrize("digest", [model_digest, base_sha256])
def test_what_a_manifest_does_not_list_counts_by_its_content(folder, digest):
    (folder / "manifest.json").write_text("{}")
    before = digest(folder)
    weights = folder / weight_files(folder)[0]
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert digest(folder) != before


def test_tokens_that_are_no_names(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null}')
    assert special_names_beside(tmp_path / "tokenizer.json") == {"bos": "<s>", "eos": "</s>"}
    for token in ({"content": 3}, {}, [1], 7):
        path.write_text(json.dumps({"bos_token": token}))
        line = refusal(special_names_beside, tmp_path / "tokenizer.json")
        assert "tokenizer_config.json" in line
    with pytest.raises(ValueError, match="none.json: no such file"):
        read_fields(tmp_path / "none.json")
