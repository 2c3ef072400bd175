"""The export in other engines: transformers and CTranslate2 on the real thing, others by its files.

They must get our ids, stop where we stop, and train on what we train on.
"""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from conftest import metrics
from safetensors.torch import save_file

from conversations import (
    FORMAT,
    FORMER_TEMPLATES,
    TEMPLATES,
    Conversation,
    Message,
    read,
    tokenize,
)
from model import SIZES, Model
from prompts import tokenize_prompt
from sample import SampleConfig, Speaker
from support.export import write_manifest, write_weights
from support.export_tokenizer import TRAINING_TEMPLATE, chat_template, write_tokenizer
from support.fields import read_fields
from support.files import written_whole
from tokenizer import EOT

# "Hi" and its end, by the Llama-2 tokenizer
HI = [6324, 32000]
# those that work with every tokenizer
ANY_BASE = sorted({*TEMPLATES, *FORMER_TEMPLATES} - {"llama-3"})


# ---- the tokenizer, with transformers as the judge


@pytest.fixture(scope="module")
def tokenizer_folder(llama_tokenizer, tmp_path_factory):
    """template -> a folder that write_tokenizer filled."""

    def write(template):
        folder = tmp_path_factory.mktemp("tokenizer")
        meta = {
            "format": FORMAT,
            "template": template,
            "max_len": 4096,
            "expert": "GPT4",
            "classes": [{"name": "GPT4", "condition": "GPT4", "weight": 1.0}],
        }
        write_tokenizer(folder, llama_tokenizer, meta)
        return folder

    return write


def auto_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(assets):
    """Real conversations: as they are, and some with a system text.

    No text is empty, and none holds the name of a special token. Answers have a weight.
    """
    found = []
    for name in ("mixed_quality.jsonl", "sharegpt_format.json"):
        for conversation in read(assets / "conversations" / name):
            if is_plain(conversation):
                found.append(with_weights(conversation))
    assert len(found) > 6100
    return found + [dataclasses.replace(c, system=" Answer in  one word.\n") for c in found[-50:]]


def is_plain(conversation):
    special = ("<s>", "</s>", "<unk>", EOT)
    for message in conversation.messages:
        if not message.text or any(name in message.text for name in special):
            return False
    return True


def with_weights(conversation):
    messages = []
    for message in conversation.messages:
        weight = 0.1 if message.role == "assistant" else 0.0
        messages.append(dataclasses.replace(message, weight=weight))
    return dataclasses.replace(conversation, condition="GPT4", messages=tuple(messages))


def as_chat(conversation):
    chat = [{"role": m.role, "content": m.text} for m in conversation.messages]
    if conversation.system is not None:
        chat.insert(0, {"role": "system", "content": conversation.system})
    return chat


@pytest.mark.parametrize("template", ANY_BASE)
def test_chat_template_gives_our_ids(llama_tokenizer, tokenizer_folder, plain, template):
    theirs = auto_tokenizer(tokenizer_folder(template))
    for conversation in plain if template == "before_speaker" else plain[::40] + plain[-50:]:
        ours, _ = tokenize(conversation, llama_tokenizer, template)
        ids = theirs.apply_chat_template(as_chat(conversation), return_dict=False)
        assert ids == ours.tolist(), conversation.where

    prompt = [{"role": "user", "content": "Hello"}]
    ours = tokenize_prompt([Message("user", "Hello")], llama_tokenizer, template, "GPT4")
    assert theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) == ours
    assert theirs.decode([*HI, llama_tokenizer.eos, 0], skip_special_tokens=True) == "Hi"


# Texts whose first token is a space alone, or a space and more; several turns, and a system text.
SPACED = [
    Conversation(
        (
            Message("user", " two  spaces ", 0.0),
            Message("assistant", f"{before}an  answer{after}", 0.1),
            Message("user", "\n", 0.0),
            Message("assistant", before + "x", 1.0),
        ),
        condition="GPT4",
        system=system,
    )
    for before in ("", " ", "  ", "\n", "\t ", " \u4f60", "\U0001f600", "1")
    for after in ("", " ", "\n\n")
    for system in (None, " be brief ")
]


@pytest.mark.parametrize("template", ANY_BASE)
def test_training_template_marks_what_has_a_weight(
    llama_tokenizer, tokenizer_folder, plain, template
):
    folder = tokenizer_folder(template)
    theirs = auto_tokenizer(folder)
    marked = (folder / TRAINING_TEMPLATE).read_text(encoding="utf-8")
    for conversation in plain[::40] + plain[-10:] + SPACED:
        ours, weights = tokenize(conversation, llama_tokenizer, template)
        found = theirs.apply_chat_template(
            as_chat(conversation),
            chat_template=marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert found["input_ids"] == ours.tolist(), conversation.where
        assert found["assistant_masks"] == (weights != 0).tolist(), conversation.where


def test_a_condition_with_quotes_survives_the_chat_template():
    """In Jinja alone, as other engines have it."""
    import jinja2

    condition = 'it\'s \\ "{{x}}" \u4f60'
    asked = {"role": "user", "content": "q"}
    answered = {"role": "assistant", "content": "a"}
    rendered = jinja2.Template(chat_template("beginning", condition)).render(
        bos_token="<s>", messages=[asked, answered]
    )
    assert rendered == f"<s>Assistant is {condition}{EOT}User: q{EOT}Assistant: a{EOT}"


def test_spaces_and_bytes_tokenize_alike(llama_tokenizer, tokenizer_folder):
    theirs = auto_tokenizer(tokenizer_folder("before_speaker"))
    spaced = [" " * n + "x" + " " * n for n in range(40)]
    others = ["\n\n  a\t b", "na\u00efve \U0001f600\u4f60\u597d", "a\u00a0b", "\u2581x"]
    for text in spaced + others:
        assert theirs(text)["input_ids"] == [1, *llama_tokenizer.encode(text)], repr(text)


# ---- where an answer stops, and what fills up a batch


def test_the_end_of_turn_is_the_eos_and_unk_the_pad(toy_run):
    """By the files, as llama.cpp's converter, CTranslate2 and vLLM read them."""
    hf = toy_run / "hf"
    config = read_fields(hf / "config.json").content
    generation = read_fields(hf / "generation_config.json").content
    drawn = SampleConfig()
    assert generation["do_sample"]
    assert generation["temperature"] == drawn.temperature
    assert (generation["top_p"], generation["top_k"]) == (drawn.top_p, drawn.top_k or 0)
    tokens = read_fields(hf / "tokenizer_config.json").content
    added = {
        token["content"]: token["id"]
        for token in read_fields(hf / "tokenizer.json").content["added_tokens"]
    }

    assert added == {"<unk>": 0, "<s>": 1, "</s>": 2, EOT: 96}
    assert added[tokens["eos_token"]] == config["eos_token_id"] == 96
    assert generation["eos_token_id"] == [96, 2]
    assert added[tokens["pad_token"]] == generation["pad_token_id"] == 0
    assert "pad_token_id" not in config
    assert tokens["additional_special_tokens"] == ["</s>"]


def test_transformers_generates_from_a_padded_batch(toy, toy_run):
    """What it is given is the tokenizer's output as it is, filled up on the left."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_run / "hf").eval()
    tokenizer = auto_tokenizer(toy_run / "hf")
    prompts = questions(toy)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    how = {"return_dict": True, "return_tensors": "pt", "padding": True}
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **how)
    assert batch["input_ids"].eq(0).any()
    longest = batch["input_ids"].shape[1]

    out = model.generate(**batch, do_sample=False, max_new_tokens=GREEDY.max_new)
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    ours = our_answers(toy_run / "hf", prompts)
    assert texts == [tokenizer.decode(answer.ids) for answer in ours]
    # the end of turn stands behind every answer, then pads
    ends = [out[b, longest + len(answer.ids)] for b, answer in enumerate(ours)]
    assert ends == [tokenizer.eos_token_id] * len(ours)


def test_the_pad_row_can_be_trained_in_transformers(toy_run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_run / "hf")
    ids = torch.tensor([[1, 0, 5]])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def as_exported_before(hf, out):
    """A copy of an export as it was while `</s>` was the eos, and without what came with that."""
    shutil.copytree(hf, out)
    (out / TRAINING_TEMPLATE).unlink()

    def rewrite(name, removed, **changed):
        content = read_fields(out / name).content | changed
        content.pop(removed)
        (out / name).write_text(json.dumps(content))

    rewrite("config.json", "dtype", eos_token_id=2)
    rewrite("generation_config.json", "pad_token_id")
    tokens = {"eos_token": "</s>", "additional_special_tokens": [EOT]}
    rewrite("tokenizer_config.json", "pad_token", **tokens)
    rewrite("crlft.json", "format")
    write_manifest(out)
    return out


def questions(toy):
    lines = (toy / "heldout.jsonl").read_text().splitlines()[:10]
    return [json.loads(line)["prompt"] for line in lines]


GREEDY = SampleConfig(temperature=0, max_new=40)


def our_answers(hf, prompts):
    speaker = Speaker(hf)
    asked = [speaker.ids([Message("user", prompt)]) for prompt in prompts]
    return speaker.answer(asked, GREEDY)


def ctranslate2_answers(hf, prompts, converted):
    """The ids of CTranslate2's likeliest answers, which are asked for by the chat template."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(hf)).convert(str(converted))
    tokenizer = auto_tokenizer(hf)
    asked = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        asked.append(tokenizer.convert_ids_to_tokens(ids))
    generator = ctranslate2.Generator(str(converted), intra_threads=1)
    how = {"max_length": GREEDY.max_new, "sampling_topk": 1, "include_prompt_in_result": False}
    return [answer.sequences_ids[0] for answer in generator.generate_batch(asked, **how)]


def test_ctranslate2_stops_where_we_do(toy, toy_run, tmp_path):
    prompts = questions(toy)
    ours = our_answers(toy_run / "hf", prompts)
    assert all(answer.finish == "stop" for answer in ours)
    theirs = ctranslate2_answers(toy_run / "hf", prompts, tmp_path / "now")
    assert theirs == [answer.ids for answer in ours]

    # with </s> as the eos it went on to the last token of ten answers
    before = as_exported_before(toy_run / "hf", tmp_path / "before")
    for ids in ctranslate2_answers(before, prompts, tmp_path / "then"):
        assert len(ids) == GREEDY.max_new


def test_an_export_made_before_says_the_same(toy, toy_run, tmp_path):
    before = as_exported_before(toy_run / "hf", tmp_path / "before")
    prompts = questions(toy)
    assert our_answers(before, prompts) == our_answers(toy_run / "hf", prompts)


# ---- the files


def test_an_export_is_a_base_again(toy, toy_run, tmp_path, train):
    data = toy / "train.safetensors"
    run = tmp_path / "run"
    words = "--steps 1 --batch_tokens 1024 --lr 1e-9".split()
    train(data, run, "--model", toy_run / "hf", *words)
    # it goes on where the first run ended, and the tokens that it adds are none
    assert metrics(run)[0]["loss"] == pytest.approx(metrics(toy_run)[-1]["loss"], abs=0.3)
    config = read_fields(run / "hf" / "config.json")
    assert config.content == read_fields(toy_run / "hf" / "config.json").content


def test_files_have_the_mode_that_the_umask_gives(toy_run, tmp_path):
    modes = {path.stat().st_mode & 0o777 for path in (toy_run / "hf").iterdir()}
    umask = os.umask(0o027)
    try:
        model = Model(SIZES["toy"])
        # memory that nobody has written may hold NaN, which no export takes
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        write_weights(tmp_path, model.config, model.named_parameters(), torch.float32)
        with written_whole(tmp_path / "x.safetensors") as partial:
            save_file({"x": torch.zeros(1)}, partial)
    finally:
        os.umask(umask)
    assert modes == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
