"""Both kinds of tokenizer: the official trainer's ids, text that stays text, exports, bases."""

import functools
import json
import random
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_SPECIALS, refused
from test_model import logits, random_model, save

import data
from conversations import Conversation, Message, tokenize, tokenizer_for
from data import PrepareConfig, Prepared, prepare
from model import Config
from prompts import prompt_tokenizer, tokenize_prompt
from sample import Speaker
from support.export_tokenizer import TRAINING_TEMPLATE
from support.hf import load_model, read_config
from tokenizer import EOT, Tokenizer

# ---- the official trainer's own

# type in its test: our template, and the condition that it samples with
OFFICIAL = {
    "openchat_v3.2": ("before_speaker", "GPT4"),
    "openchat_v3.2_mistral": ("before_speaker", "GPT4 Correct"),
    "openchat_3.6": ("llama-3", "GPT4 Correct"),
}


# to build Llama-3's takes a second or two
opened = functools.cache(tokenizer_for)


@pytest.fixture(scope="module")
def official_file(assets, llama3_file):
    return {
        "openchat_v3.2": assets / "llama2" / "tokenizer.model",
        "openchat_v3.2_mistral": assets / "tokenizers" / "mistral-7b-v0.1.tokenizer.model",
        "openchat_3.6": llama3_file,
    }


@pytest.mark.parametrize("kind", OFFICIAL)
def test_the_official_golden_conversations(official_file, kind):
    """Tokens and weights of the four conversations of its test, the second with users' weights,
    and of its two prompts.

    Their texts are read back from the tokens, which lose nothing; some hold the names of special
    tokens.
    """
    template, condition = OFFICIAL[kind]
    tokenizer = opened(template, official_file[kind])
    golden = json.loads((ROOT / "tests" / "golden_openchat.json").read_text())[kind]
    assert len(golden["conversations"]) == 4
    for expected in golden["conversations"]:
        system, said = system_and_texts(expected, tokenizer, template)
        messages = []
        for (role, text), weight in zip(said, expected["message_weights"], strict=True):
            messages.append(Message(role, text, weight))
        conversation = Conversation(tuple(messages), system=system, condition=expected["condition"])
        tokens, weights = tokenize(conversation, tokenizer, template)
        assert tokens.tolist() == expected["tokens"]
        runs = [[weight] * count for weight, count in expected["weights"]]
        assert weights.tolist() == np.float32(list(chain.from_iterable(runs))).tolist()

    assert len(golden["prompts"]) == 2
    for expected in golden["prompts"]:
        system, said = system_and_texts(expected, tokenizer, template)
        messages = [Message(role, text) for role, text in said]
        prompt = tokenize_prompt(messages, tokenizer, template, condition, system)
        assert prompt == expected["tokens"]


def system_and_texts(expected, tokenizer, template):
    """(system text or None, [(role, text)]) of a golden row's tokens."""
    texts = []
    ids = []
    for token in expected["tokens"][1:]:
        if token != tokenizer.eot:
            ids.append(token)
            continue
        text = tokenizer.decode(ids)
        if template == "llama-3":
            # the header's tokens say nothing; its role ends in a blank line
            header, _, text = text.partition("\n\n")
            text = f"GPT4 {header.split()[-1]}: {text}"
        texts.append(text)
        ids = []

    system = None
    if expected["has_system"]:
        system = texts.pop(0).removeprefix("GPT4 System: ")
    said = []
    for text in texts:
        head, _, rest = text.partition(": ")
        said.append((head.split()[-1].lower(), rest))
    return system, said


# ---- text that stays text


def tokenizers_of(byte_level_file, official_file):
    yield Tokenizer(byte_level_file)
    for kind, (template, _) in OFFICIAL.items():
        yield opened(template, official_file[kind])


def test_no_text_becomes_a_special_token(byte_level_file, official_file):
    rng = random.Random(0)
    letters = "ab <|>_/s\n\u4f60\U0001f600\u00a0"
    for tokenizer in tokenizers_of(byte_level_file, official_file):
        names = [*tokenizer.library.specials, EOT, tokenizer.end_of_turn, "<unk>"]
        special = {*tokenizer.library.specials.values(), tokenizer.eot}
        texts = list(names)
        for _ in range(500):
            parts = [rng.choice(names), *rng.choices(letters, k=5), rng.choice(names)]
            rng.shuffle(parts)
            texts.append("".join(parts))
        for text in texts:
            ids = tokenizer.encode(text)
            assert not special & set(ids), text
            assert tokenizer.decode(ids) == text


def test_special_tokens_say_nothing_and_have_names(byte_level_file):
    tokenizer = Tokenizer(byte_level_file)
    hi = tokenizer.encode("Hi")
    assert tokenizer.decode([tokenizer.bos, *hi, tokenizer.eot]) == "Hi"
    assert tokenizer.piece(tokenizer.eot) == EOT
    assert tokenizer.piece(tokenizer.bos) == "<|endoftext|>"
    assert tokenizer.piece(tokenizer.vocab_size) == f"<{tokenizer.vocab_size}>"
    assert tokenizer.encode("") == []


def test_the_template_says_what_ends_a_turn(llama3_file):
    theirs = opened("llama-3", llama3_file)
    assert (theirs.bos, theirs.eos, theirs.eot) == (128000, 128001, 128009)
    assert theirs.vocab_size == theirs.file_size == 128256
    assert theirs.first_special == 128000
    ours = tokenizer_for("before_speaker", llama3_file)
    assert (ours.eot, ours.vocab_size) == (128256, 128257)
    assert ours.encode("Hi") == theirs.encode(" Hi")


# ---- files that do not do


def edited(file, folder, **fields):
    """A copy of a tokenizer.json with other fields."""
    content = json.loads(file.read_text()) | fields
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer .NFC."),
        ({"normalizer": ["NFC"]}, "has a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no[t]? a byte-level BPE"),
        ({"added_tokens": []}, "no bos_token"),
        ({"model": 3}, "not a byte-level BPE"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_named(byte_level_file, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(edited(byte_level_file, tmp_path, **fields))


def test_an_id_that_no_token_has_is_named(byte_level_file, tmp_path):
    added = json.loads(byte_level_file.read_text())["added_tokens"]
    added[0]["id"] = 2**31
    with pytest.raises(ValueError, match="the id 2147483648, which no to"):
        Tokenizer(edited(byte_level_file, tmp_path, added_tokens=added))


def test_a_panic_of_the_library_is_a_refusal(byte_level_file, tmp_path, monkeypatch):
    model = json.loads(byte_level_file.read_text())["model"]
    path = edited(byte_level_file, tmp_path, model=model | {"continuing_subword_prefix": "x" * 50})
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        Tokenizer(path)
    # what Rust's panic looks like from here
    PanicException = type("PanicException", (BaseException,), {})

    def panics(file):
        raise PanicException("byte index 5 is out of bounds")

    monkeypatch.setattr("tokenizer.tokenizers.Tokenizer", SimpleNamespace(from_buffer=panics))
    with pytest.raises(ValueError, match="not a whole one .byte index 5"):
        Tokenizer(byte_level_file)


def test_a_special_token_that_a_text_can_spell_is_named(byte_level_file, tmp_path):
    content = json.loads(byte_level_file.read_text())
    # no special token any more: the library finds it in every text
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    path = edited(byte_level_file, tmp_path, added_tokens=content["added_tokens"])
    with pytest.raises(ValueError, match="text '<|im_end|>'"):
        Tokenizer(path, end_of_turn="<|im_end|>")


def test_bos_eos_and_pad_come_from_the_file_beside_it(byte_level_file, tmp_path):
    path = edited(byte_level_file, tmp_path)
    tokenizer = Tokenizer(path)
    # the known names; the pad can be neither bos nor the end of turn
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 0, len(SMALL_SPECIALS) - 1)

    beside = path.with_name("tokenizer_config.json")
    names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    beside.write_text(json.dumps(names | {"pad_token": "<repo_name>"}))
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 3)
    beside.write_text(json.dumps({"bos_token": "<nobody>", "eos_token": "<|im_end|>"}))
    with pytest.raises(ValueError, match="no bos_token .<nobody>."):
        Tokenizer(path)
    beside.write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        Tokenizer(path)


def test_a_template_that_the_tokenizer_lacks_tokens_for_is_named(toy, byte_level_file, tmp_path):
    words = "prepare", toy / "train.jsonl", "--out", tmp_path / "x.safetensors"
    for tokenizer in (toy / "tokenizer.model", byte_level_file):
        message = refused(data.main, *words, "--tokenizer", tokenizer, "--template", "llama-3")
        assert "no <|eot_id|>" in message


# ---- a byte-level base, from conversations to an export and back

TABLE = "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"
ODD = " \n  x  y\n", "1234 567", "na\u00efve \U0001f600\u4f60", "it's  <b>\t</b>"


def prepared(folder, toy, tokenizer, template="before_speaker"):
    path = folder / "train.safetensors"
    files = (str(toy / "train.jsonl"),)
    prepare(PrepareConfig(files, str(tokenizer), str(path), TABLE, template=template, max_len=128))
    return path


def tied_base(folder, tokenizer_file):
    """A small base in the form of SmolLM2's: a tied head, a byte-level tokenizer."""
    vocab = Tokenizer(tokenizer_file).file_size
    config = Config(
        32, 64, 2, 2, 1, vocab_size=vocab, max_position_embeddings=256, tie_word_embeddings=True
    )
    save(random_model(config), folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    return folder


def as_chat(said):
    """A system text and turns, for transformers."""
    system, *turns = said
    chat = [{"role": "system", "content": system}]
    for i, text in enumerate(turns):
        chat.append({"role": ("user", "assistant")[i % 2], "content": text})
    return chat


def as_conversation(said):
    system, *turns = said
    messages = []
    for i, text in enumerate(turns):
        messages.append(Message(("user", "assistant")[i % 2], text, float(i % 2)))
    return Conversation(tuple(messages), system=system, condition="GPT4")


def test_a_byte_level_base_trains_exports_and_is_a_base_again(
    toy, byte_level_file, tmp_path, train
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tied_base(tmp_path / "base", byte_level_file)
    path = prepared(tmp_path, toy, base / "tokenizer.json")
    words = "--steps 2 --batch_tokens 512 --micro_tokens 256".split()
    train(path, tmp_path / "run", "--model", base, *words)
    hf = tmp_path / "run" / "hf"

    # the base's tokenizer.json with one token more, and beside it as it was
    content = json.loads(byte_level_file.read_text())
    exported = json.loads((hf / "tokenizer.json").read_text())
    *same, added = exported.pop("added_tokens")
    assert same == content.pop("added_tokens")
    assert (added["content"], added["special"]) == (EOT, True)
    assert exported == content
    assert (hf / "tokenizer.base.json").read_bytes() == byte_level_file.read_bytes()

    # transformers gets our ids, our mask and our logits
    speaker = Speaker(hf)
    theirs = AutoTokenizer.from_pretrained(hf)
    assert (theirs.eos_token, theirs.pad_token) == (EOT, "<empty_output>")
    marked = (hf / TRAINING_TEMPLATE).read_text()
    for said in (ODD, ("Be brief.", "copy a b", "a b"), ("s", "q", "a", "q2", "a2")):
        tokens, weights = tokenize(as_conversation(said), speaker.tokenizer)
        assert theirs.apply_chat_template(as_chat(said), return_dict=False) == tokens.tolist()
        found = theirs.apply_chat_template(
            as_chat(said), chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert found["assistant_masks"] == (weights != 0).tolist()
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    prompt = torch.tensor(speaker.ids([Message("user", "copy a b")]))
    with torch.no_grad():
        assert torch.allclose(
            logits(speaker.model, [prompt])[0], model(prompt[None]).logits[0], atol=1e-5
        )

    # a base again: the same ids of the same tokenizer, and no row more
    (tmp_path / "again").mkdir()
    again = prepared(tmp_path / "again", toy, hf / "tokenizer.base.json")
    assert Prepared(again).tokens.tolist() == Prepared(path).tokens.tolist()
    train(again, tmp_path / "again" / "run", "--model", hf, *words)
    assert read_config(tmp_path / "again" / "run" / "hf") == read_config(hf)


LLAMA3_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


def small_llama3(folder, file):
    """A tokenizer.json of Llama-3's form: its special tokens, behind the merges."""
    content = json.loads(file.read_text())
    size = Tokenizer(file).file_size
    like = content["added_tokens"][0]
    content["added_tokens"] = []
    for i, name in enumerate(LLAMA3_NAMES):
        content["added_tokens"].append(like | {"id": size + i, "content": name})
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path, size


def test_template_llama_3_trains_the_bases_own_tokens(toy, byte_level_file, tmp_path, train):
    """It adds no token; rows that the base never trained start as the mean."""
    from transformers import AutoTokenizer

    tokenizer_file, size = small_llama3(tmp_path, byte_level_file)
    bos, eos, header, header_end, eot = range(size, size + 5)
    config = Config(8, 16, 1, 1, 1, vocab_size=size + 5, max_position_embeddings=256)
    model = random_model(config)
    never_trained = header, header_end
    with torch.no_grad():
        for row in never_trained:
            model.model.embed_tokens.weight[row] = 1e-20
    base = save(model, tmp_path / "base")
    shutil.copy(tokenizer_file, base / "tokenizer.json")

    path = prepared(tmp_path, toy, base / "tokenizer.json", "llama-3")
    meta = Prepared(path).meta
    assert (meta["bos"], meta["eos"], meta["eot"]) == (bos, eos, eot)
    words = "--steps 1 --lr 1e-30 --batch_tokens 512 --micro_tokens 256".split()
    printed = train(path, tmp_path / "run", "--model", base, *words)
    assert "was not trained on <|start_header_id|> <|end_header_id|>:" in printed

    hf = tmp_path / "run" / "hf"
    assert (hf / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    weights = load_model(hf).model.embed_tokens.weight
    ordinary = model.model.embed_tokens.weight[:size].mean(0)
    for row in never_trained:
        assert torch.allclose(weights[row], ordinary, atol=1e-6)
    # a trained one stays
    assert torch.allclose(weights[eot], model.model.embed_tokens.weight[eot], atol=1e-6)

    # its chat template trims, as OpenChat's does; nothing else differs
    theirs = AutoTokenizer.from_pretrained(hf)
    tokenizer = tokenizer_for("llama-3", tokenizer_file)
    for said in (("S", "q  <b>", "a\n\nb"), ("Be brief.", "1234", "x", "y", "z")):
        tokens, _ = tokenize(as_conversation(said), tokenizer, "llama-3")
        assert theirs.apply_chat_template(as_chat(said), return_dict=False) == tokens.tolist()
    padded = [" S ", "\nq ", " a"]
    trimmed = [text.strip() for text in padded]
    ids = [
        theirs.apply_chat_template(as_chat(said), return_dict=False) for said in (padded, trimmed)
    ]
    assert ids[0] == ids[1]
    stops = json.loads((hf / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [eot, eos]


@pytest.mark.parametrize("template", ["chatml", "llama-3-chat"])
def test_other_models_prompts_are_their_chat_templates(byte_level_file, tmp_path, template):
    """The ids by hand: each special token, and the text between two of them."""
    messages = [Message("user", " Hi <|im_end|>"), Message("assistant", "Ho"), Message("user", "x")]
    file = byte_level_file
    if template == "llama-3-chat":
        file, _ = small_llama3(tmp_path, byte_level_file)
    tokenizer = prompt_tokenizer(template, file)
    expected = {
        "chatml": (
            "<|im_start|>", "system\nS", "<|im_end|>", "\n",
            "<|im_start|>", "user\n Hi <|im_end|>", "<|im_end|>", "\n",
            "<|im_start|>", "assistant\nHo", "<|im_end|>", "\n",
            "<|im_start|>", "user\nx", "<|im_end|>", "\n",
            "<|im_start|>", "assistant\n",
        ),
        "llama-3-chat": (
            "<|begin_of_text|>",
            "<|start_header_id|>", "system", "<|end_header_id|>", "\n\nS", "<|eot_id|>",
            "<|start_header_id|>", "user", "<|end_header_id|>", "\n\nHi <|im_end|>", "<|eot_id|>",
            "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\nHo", "<|eot_id|>",
            "<|start_header_id|>", "user", "<|end_header_id|>", "\n\nx", "<|eot_id|>",
            "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n",
        ),
    }  # fmt: skip
    ids = []
    for part in expected[template]:
        id_ = tokenizer.library.id_of(part)
        ids += tokenizer.encode(part) if id_ is None else [id_]
    assert tokenize_prompt(messages, tokenizer, template, None, "S") == ids
