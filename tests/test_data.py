"""From files to a prepared file: conversations.py, tokenizer.py, prompts.py and data.py.

The golden token lists are those of the public trainer.
"""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conversations import (
    BEGINNING_1,
    TEMPLATES,
    Conversation,
    Message,
    cut_to_length,
    read,
    template_of,
    tokenize,
)
from data import LEDGER, PrepareConfig, Prepared, prepare
from data import main as data_main
from prompts import tokenize_prompt
from tokenizer import EOT, Tokenizer

TABLE = "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"
# fmt: off
HELLO = [1, 402, 7982, 29946, 4911, 29901, 15043, 32000, 402, 7982, 29946, 4007, 22137, 29901]
HI = [6324, 32000]
HOW = [402, 7982, 29946, 4911, 29901, 1128, 526, 366, 9826, 29973, 32000,
       402, 7982, 29946, 4007, 22137, 29901]
BEGINNING = [1, 4007, 22137, 338, 402, 7982, 29946, 32000,
             4911, 29901, 15043, 32000, 4007, 22137, 29901]
BEFORE_ASSISTANT = [1, 4911, 29901, 15043, 32000, 402, 7982, 29946, 4007, 22137, 29901]
NONE = [1, 4911, 29901, 15043, 32000, 4007, 22137, 29901]
# fmt: on


def user(text):
    return Message("user", text)


def talk(*texts, weight=1.0, **fields):
    """user, assistant, user, ...; only answers have the weight."""
    messages = []
    for i, text in enumerate(texts):
        is_answer = i % 2 == 1
        messages.append(
            Message("assistant", text, weight) if is_answer else Message("user", text, 0.0)
        )
    return Conversation(tuple(messages), condition="GPT4", class_id=0, **fields)


def prepared(folder, files, tokenizer, classes=TABLE, **flags):
    """(metadata, path) of a prepared file in the folder."""
    path = folder / "x.safetensors"
    files = tuple(str(file) for file in files)
    meta = prepare(PrepareConfig(files, str(tokenizer), str(path), classes, **flags))
    return meta, path


def real_files(assets):
    names = ("mixed_quality.jsonl", "sharegpt_format.json")
    return [assets / "conversations" / name for name in names]


# ---- tokens


def test_golden_prompts(llama_tokenizer):
    def prompt(*messages, template="before_speaker"):
        return tokenize_prompt(messages, llama_tokenizer, template, "GPT4")

    hello = user("Hello")
    assert prompt(hello) == HELLO
    more = Message("assistant", "Hi"), user("How are you today?")
    assert prompt(hello, *more) == HELLO + HI + HOW
    assert prompt(hello, template="beginning") == BEGINNING
    assert prompt(hello, template=BEGINNING_1) == BEGINNING
    assert prompt(hello, template="before_assistant") == BEFORE_ASSISTANT
    assert prompt(hello, template="none") == NONE
    assert prompt(hello, template="base") == [1, 15043]


def test_training_tokens_continue_the_prompt_and_only_the_answer_has_weight(llama_tokenizer):
    tokens, weights = tokenize(talk("Hello", "Hi", weight=0.1), llama_tokenizer)
    assert tokens.tolist() == HELLO + HI
    assert tokens.dtype == np.int32
    assert weights.tolist() == [0.0] * len(HELLO) + [np.float32(0.1)] * 2
    assert weights.dtype == np.float32


def test_a_system_text_stands_first_without_a_role(llama_tokenizer):
    tokens, weights = tokenize(talk("Hello", "Hi", system="Be brief."), llama_tokenizer)
    system = llama_tokenizer.encode("Be brief.")
    assert tokens.tolist() == [1, *system, 32000, *HELLO[1:], *HI]
    assert weights[: len(system) + 2].sum() == 0


def test_beginning_says_the_condition_before_the_system_text(llama_tokenizer):
    conversation = talk("Hello", "Hi", system="Be brief.")
    system = [*llama_tokenizer.encode("Be brief."), 32000]
    opening, turns = BEGINNING[1:8], BEGINNING[8:]
    now, _ = tokenize(conversation, llama_tokenizer, "beginning")
    assert now.tolist() == [1, *opening, *system, *turns, *HI]
    # files and exports of before keep the order that they were made with
    former, _ = tokenize(conversation, llama_tokenizer, template_of({"template": "beginning"}))
    assert former.tolist() == [1, *system, *opening, *turns, *HI]
    assert template_of({"template": "beginning", "format": 2}) == "beginning"
    assert template_of({"template": "none"}) == "none"


def test_special_tokens_in_text_stay_text(llama_tokenizer):
    for text in ("</s>", "<s>", EOT, "<unk>", f"a{EOT}b"):
        ids = llama_tokenizer.encode(text)
        assert not {0, 1, 2, 32000} & set(ids)
        assert llama_tokenizer.decode(ids) == text


# ---- classes


def test_every_arm_of_table_2_is_a_table(toy, tmp_path):
    def classes_of(table, template="before_speaker"):
        files = [toy / "train.jsonl"]
        meta, _ = prepared(tmp_path, files, toy / "tokenizer.model", table, template=template)
        return meta["classes"]

    assert [c["weight"] for c in classes_of(TABLE)] == [1.0, 0.1]
    without_reward = classes_of("Model: GPT-4=GPT4:1.0,*=GPT3:1.0")
    assert [c["weight"] for c in without_reward] == [1.0, 1.0]
    without_condition = classes_of(TABLE, "none")
    assert [c["condition"] for c in without_condition] == ["", ""]


def test_conversations_of_a_class_with_weight_0_are_dropped_and_counted(toy, tmp_path):
    table = "Model: GPT-4=GPT4:1.0,*=GPT3:0"
    files = [toy / "train.jsonl"]
    meta, path = prepared(tmp_path, files, toy / "tokenizer.model", table, template="none")
    assert meta["counts"]["GPT3"]["dropped_conversations"] == 5500
    assert len(Prepared(path)) == 500


# ---- the ledger


def balanced(n):
    ends = ("trained", "prompt", "truncated", "dropped", "trailing_cut")
    return n["tokens_read"] + n["added_by_split"] == sum(n[key] for key in ends)


@st.composite
def conversations(draw):
    """Short ones, of every order of roles, weight and emptiness."""
    text = st.text("abc ", max_size=12)
    roles = st.sampled_from(["user", "assistant"])
    weights = st.sampled_from([0.0, 0.1, 1.0])
    messages = []
    for _ in range(draw(st.integers(1, 9))):
        message = Message(draw(roles), draw(text), draw(weights))
        if message.role == "user":
            message = dataclasses.replace(message, weight=0.0)
        messages.append(message)
    return Conversation(tuple(messages), condition="GPT4", system=draw(st.none() | text))


@settings(max_examples=150, deadline=None)
@given(
    conversations(),
    st.sampled_from(["truncate", "split", "drop"]),
    st.integers(2, 80),
    st.sampled_from(sorted({*TEMPLATES} - {"llama-3"})),
)
def test_the_ledger_balances_to_the_token(toy_tokenizer, conversation, how, max_len, template):
    kept, ledger = cut_to_length(conversation, toy_tokenizer, template, max_len, how)
    assert balanced(ledger)
    assert ledger["trained"] == sum(np.count_nonzero(weights) for _, weights in kept)
    assert ledger["prompt"] == sum((weights == 0).sum() for _, weights in kept)
    for tokens, weights in kept:
        assert len(tokens) == len(weights) <= max_len
        assert weights[-1] > 0
        assert weights[0] == 0

    answers = [m for m in conversation.messages if m.role == "assistant"]
    if any(m.weight and not m.text.strip() for m in answers):
        assert not kept
    if how == "drop" and ledger["tokens_read"] > max_len:
        assert not kept
    if how != "split":
        assert ledger["added_by_split"] == 0
        assert len(kept) <= 1


@pytest.fixture(scope="session")
def toy_tokenizer(toy):
    return Tokenizer(toy / "tokenizer.model")


def test_split_cuts_at_turns_and_repeats_the_preamble(toy_tokenizer):
    def exchange(*texts):
        tokens, _ = tokenize(talk(*texts, system="a b c"), toy_tokenizer)
        return tokens.tolist()

    long = talk("copy a b", "a b", "sort c a", "a c", "copy d", "d", system="a b c")
    first_two = exchange("copy a b", "a b", "sort c a", "a c")
    max_len = len(first_two)
    kept, ledger = cut_to_length(long, toy_tokenizer, "before_speaker", max_len, "split")
    assert [tokens.tolist() for tokens, _ in kept] == [first_two, exchange("copy d", "d")]
    assert ledger["added_by_split"] == 5  # <s> a b c EOT
    assert ledger["truncated"] == 0

    kept, ledger = cut_to_length(long, toy_tokenizer, "before_speaker", max_len, "truncate")
    assert [tokens.tolist() for tokens, _ in kept] == [first_two]
    assert ledger["truncated"] + ledger["trailing_cut"] > 0


def test_turns_that_do_not_alternate_are_taken_as_they_come(toy_tokenizer):
    """Two questions in a row, two answers, an answer first: each has its own prefix and end."""
    messages = (
        Message("assistant", "a", 1.0),
        user("copy b"),
        user("copy c"),
        Message("assistant", "b", 1.0),
        Message("assistant", "c", 0.5),
    )
    conversation = Conversation(messages, condition="GPT4")
    kept, _ = cut_to_length(conversation, toy_tokenizer, "before_speaker", 99, "split")
    ((tokens, weights),) = kept
    text = "".join(map(toy_tokenizer.piece, tokens.tolist())).replace("\u2581", " ")
    said = (
        ("Assistant", "a"),
        ("User", "copy b"),
        ("User", "copy c"),
        ("Assistant", "b"),
        ("Assistant", "c"),
    )
    assert text == "<s>" + "".join(f" GPT4 {who}: {what}{EOT}" for who, what in said)
    assert weights.sum() == 2 + 2 + 1


def test_emoji_mixed_languages_and_a_very_long_message(llama_tokenizer, tmp_path):
    texts = [
        "\U0001f469\u200d\U0001f680 na\u00efve \u4f60\u597d \u0645\u0631\u062d\u0628\u0627",
        "x" * 100_000,
        "a\r\nb\x00c",
    ]
    path = tmp_path / "x.jsonl"
    lines = []
    for text in texts:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"id": "same", "messages": turns}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    # an id that stands twice is two conversations
    assert [c.messages[1].text for c in read(path)] == texts
    for text in texts:
        assert llama_tokenizer.decode(llama_tokenizer.encode(text)) == text
    messages = (user("q"), Message("assistant", texts[1], 1.0))
    long = dataclasses.replace(read(path)[1], condition="GPT4", messages=messages)
    kept, ledger = cut_to_length(long, llama_tokenizer, "before_speaker", 4096, "truncate")
    ((tokens, _),) = kept
    assert len(tokens) == 4096
    assert ledger["truncated"] == ledger["tokens_read"] - 4096


def test_an_unanswered_turn_is_cut_and_a_conversation_without_answer_is_dropped(toy_tokenizer):
    def cut(*texts):
        return cut_to_length(talk(*texts), toy_tokenizer, "before_speaker", 99, "truncate")

    kept, ledger = cut("copy a", "a", "copy b")
    answered, _ = tokenize(talk("copy a", "a"), toy_tokenizer)
    assert kept[0][0].tolist() == answered.tolist()
    assert ledger["trailing_cut"] == 7
    for texts in (("copy a",), ("copy a", "")):
        kept, ledger = cut(*texts)
        assert not kept
        assert ledger["dropped"] == ledger["tokens_read"]
        assert ledger["dropped_conversations"] == 1
    # an empty question stays
    kept, _ = cut("", "a")
    assert len(kept) == 1
    # nothing of it is left before max_len: it is dropped, not cut
    kept, ledger = cut("a " * 99, "a")
    assert not kept
    assert ledger["dropped_conversations"] == 1
    assert ledger["truncated_conversations"] == 0


def test_a_name_with_line_breaks_is_printed_on_one_line(toy, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    words = "--tokenizer", str(toy / "tokenizer.model"), "--out", str(path)
    data_main(["prepare", str(toy / "train.jsonl"), *words, "--classes", "*=G\nP:1"])
    data_main(["show", str(path), "--n", "1"])
    data_main(["stats", str(path)])
    out = capsys.readouterr().out
    assert out.count("G\\nP") >= 8
    assert not any(line.startswith("P") for line in out.splitlines())


def test_real_files_are_prepared_and_counted(assets, tmp_path):
    tokenizer = assets / "llama2" / "tokenizer.model"
    meta, path = prepared(tmp_path, real_files(assets), tokenizer)
    file = Prepared(path)
    counts = meta["counts"]
    assert all(map(balanced, counts.values()))
    assert meta["expert"] == "GPT4"
    assert counts["GPT4"]["conversations"] == 805
    assert counts["GPT3"]["conversations"] == 5632 - 805 + 500
    assert counts["GPT3"]["dropped_conversations"] == 2
    assert len(file) == 5632 + 500 - 2
    assert file.lengths.max() <= 4096
    assert len(file.tokens) == sum(c["trained"] + c["prompt"] for c in counts.values())
    assert file.supervised.sum() == sum(c["trained"] for c in counts.values())

    # no prompt stands on both sides
    train, val = file.split(0.05)
    assert len(val)
    assert not set(file.group[train].tolist()) & set(file.group[val].tolist())
    assert len(set(file.group[file.class_ids == 0].tolist())) == 805
    # nothing is left of writing the file
    assert not list(tmp_path.glob(".*"))


# ---- the prepared file


# What opening a file costs of a process's own memory, in MB: mapped pages do not count.
OPENING = """
import sys
import data

def own():
    lines = open("/proc/self/status").read().splitlines()
    line, = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1])

before = own()
prepared = data.Prepared(sys.argv[1])
assert prepared.weight_sums.sum() == 2**25 - 2**14
prepared.batch([0, 1])
print((own() - before) // 1024)
"""


def made_up(path, lengths):
    """The path of a prepared file of before there were digests: conversations of these lengths, all
    of whose tokens but the first are trained on."""
    tokens = int(lengths.sum())
    arrays = {}
    arrays["tokens"] = np.ones(tokens, np.int32)
    arrays["weights"] = np.ones(tokens, np.float32)
    arrays["offsets"] = np.cumsum([0, *lengths], dtype=np.int64)
    arrays["weights"][arrays["offsets"][:-1]] = 0
    arrays["class_ids"] = np.zeros(len(lengths), np.int16)
    arrays["group"] = np.arange(len(lengths))
    arrays["tokenizer"] = np.zeros(1, np.uint8)
    counts = dict.fromkeys(LEDGER, 0)
    counts["tokens_read"] = tokens
    counts["prompt"] = len(lengths)
    counts["trained"] = tokens - len(lengths)
    meta = {
        "tokenizer_sha256": hashlib.sha256(arrays["tokenizer"]).hexdigest(),
        "vocab_size": 99,
        "template": "none",
        "max_len": 4096,
        "classes": [{"name": "A", "condition": "A", "weight": 1}],
        "expert": "A",
        "counts": {"A": counts},
    }
    save_file(arrays, path, metadata={"crlft": json.dumps(meta)})
    return path


def test_a_prepared_file_is_mapped_not_loaded(tmp_path):
    """Opening 256 MB of tokens and weights costs little memory of one's own, and reading a
    conversation touches only its pages."""
    path = made_up(tmp_path / "x.safetensors", np.full(2**14, 2**11))
    out, _ = call("-c", OPENING, path)
    assert int(out) < 64, out  # MB, of 256
