"""From files to a prepared file: conversations.py, tokenizer.py, prompts.py and data.py.

The golden token lists are those of the public trainer.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conversations import (
    BEGINNING_1,
    FORMAT,
    FORMER_TEMPLATES,
    TEMPLATES,
    Classes,
    Conversation,
    Message,
    cut_to_length,
    glob_match,
    parse_classes,
    read,
    role_texts,
    template_of,
    tokenize,
)
from data import PrepareConfig, Prepared, prepare
from prompts import tokenize_prompt
from support.export import chat_template, write_tokenizer
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


# ---- reading


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SHAREGPT = {"model": "Model: GPT-4", "conversations": TURNS}
OPENCHAT_2023 = {"id": "x", "model": "Model: GPT-4", "items": TURNS}
OPENAI = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
}
OPENCHAT = {
    "items": [
        {"role": "user", "content": "q", "weight": 0.0},
        {"role": "assistant", "content": "a", "weight": 0.3},
    ],
    "condition": "GPT3",
    "system": "",
}


@pytest.mark.parametrize("as_array", [False, True])
def test_formats_are_recognized_by_content_and_may_be_mixed(tmp_path, as_array):
    rows = [SHAREGPT, OPENCHAT_2023, OPENAI, OPENCHAT]
    text = "\r\n".join(map(json.dumps, rows)) + "\n\n"
    if as_array:
        text = json.dumps(rows, indent=1)
    path = tmp_path / "any.name"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows editors save it

    got = read(path)
    assert len(got) == 4
    for conversation in got:
        said = [(message.role, message.text) for message in conversation.messages]
        assert said == [("user", "q"), ("assistant", "a")]
    assert [c.label for c in got] == ["Model: GPT-4", "Model: GPT-4", "", ""]
    assert [c.system for c in got] == [None, None, "s", None]  # OpenChat's "system": "" is none
    assert got[3].condition == "GPT3"
    assert got[3].messages[1].weight == 0.3


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"conversations": [', "not JSON"),
        ("[1, 2", "not JSON"),
        ("7", "where a conversation object belongs"),
        ('{"id": 1}', "no messages"),
        ('{"messages": []}', "no messages"),
        ('{"messages": ["hi"]}', "not an object"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool' is not one of"),
        ('{"messages": [{"role": "user"}]}', "no text"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "only a system"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
            "does not stand first",
        ),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": -1}]}', "weight -1"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": NaN}]}', "weight nan"),
        (
            '{"messages": [{"role": "assistant", "content": "x", "weight": 1' + "0" * 400 + "}]}",
            "message weight 1000",
        ),
        ('{"messages": [{"role": "user", "content": "x", "weight": 1}]}', "only assistant text"),
        ('{"messages": [{"role": "system", "content": "x", "weight": 1}]}', "only assistant text"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "role .'user'. is not one of"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"system": 5, "messages": [{"role": "user", "content": "x"}]}', "system 5 is not a text"),
        ('{"model": 4, "messages": [{"role": "user", "content": "x"}]}', "model 4"),
    ],
)
def test_a_bad_line_is_named_with_its_place(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(SHAREGPT) + "\n" + line)
    with pytest.raises(ValueError, match=f"bad.jsonl:2: .*{problem}"):
        read(path)


# ---- classes


def test_the_first_glob_wins_and_only_star_and_question_mark_are_special():
    classes = Classes(parse_classes("Model: GPT-4=GPT4:1.0,[ab]=odd:2,gpt?=near:0.5,*=GPT3:0.1"))
    expected = {
        "Model: GPT-4": "GPT4",
        "model: gpt-4": "GPT3",
        "a": "GPT3",
        "[ab]": "odd",
        "gptX": "near",
        "gptXY": "GPT3",
        "": "GPT3",
    }
    for label, name in expected.items():
        conversation = classes.assign(Conversation((user("q"),), label))
        assert classes.all[conversation.class_id].name == name, label
    assert glob_match("a*", "a\nb")
    assert not glob_match("a.b", "axb")


def test_split_at_the_last_equals_and_the_last_colon():
    ((glob, c),) = parse_classes("a=b: c=Who: Me:0.5")
    assert (glob, c.condition, c.weight) == ("a=b: c", "Who: Me", 0.5)


def test_beta_turns_rewards_into_weights():
    """Eq. 6: exp((r_c - 1) / beta), 1 for the expert; alpha 0, beta 1 / ln 10: the paper's 0.1."""
    weights = [c.weight for _, c in parse_classes("a=A:1,*=B:0", beta=1 / math.log(10))]
    assert weights == [1.0, pytest.approx(0.1)]


@pytest.mark.parametrize(
    "text", ["GPT4", "a=b:1e39", "a=b", "a=:1", "a=b:x", "a=b:-1", "a=b:nan", "a=b:1,"]
)
def test_a_malformed_table_stops(text):
    with pytest.raises(ValueError, match="--classes"):
        parse_classes(text)


def test_a_label_without_class_and_an_answer_without_weight_stop():
    unknown = Conversation((user("q"),), "x", where="f:3")
    with pytest.raises(ValueError, match="f:3: label 'x' matches no class"):
        Classes(parse_classes("a=A:1")).assign(unknown)
    messages = (user("q"), Message("assistant", "a"))
    unweighted = Conversation(messages, condition="C", where="f:3")
    with pytest.raises(ValueError, match="f:3: an answer without weight"):
        Classes().assign(unweighted)


def test_a_reward_beyond_all_weights_stops():
    with pytest.raises(ValueError, match="'.=A:2' gives the weight"):
        parse_classes("*=A:2", beta=0.001)


def test_openchats_empty_condition_is_no_class_of_the_rows_own():
    row = Conversation((user("q"), Message("assistant", "a", 0.3)), condition="")
    classes = Classes()
    assert classes.assign(row).condition == ""
    assert classes.all[0].name == "none"
    assert role_texts("before_speaker", "")[:2] == ("User:", "Assistant:")
    assert Classes(parse_classes(TABLE)).assign(row).condition == "GPT3"
    classes.assign(dataclasses.replace(row, condition="none"))
    assert [c.name for c in classes.all] == ["none", "none_"]  # the ledger is kept by name


def test_a_message_weight_overrides_its_class_and_rows_may_bring_their_condition():
    classes = Classes(parse_classes(TABLE))
    own = Message("assistant", "a", 0.7)
    messages = (user("q"), own, user("q"), Message("assistant", "b"))
    row = Conversation(messages, "Model: GPT-4")
    assert [m.weight for m in classes.assign(row).messages] == [0.0, 0.7, 0.0, 1.0]
    other = classes.assign(dataclasses.replace(row, condition="GPT3"))
    assert other.condition == "GPT3"
    assert [m.weight for m in other.messages] == [0.0, 0.7, 0.0, 0.1]


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
    st.sampled_from(sorted(TEMPLATES)),
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

    answers = [m.text for m in conversation.messages if m.role == "assistant"]
    if any(not text.strip() for text in answers):
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

data.Tokenizer = lambda model: None
before = own()
prepared = data.Prepared(sys.argv[1])
assert prepared.weight_sums.sum() == 2**25
prepared.batch([0, 1])
print((own() - before) // 1024)
"""


def test_a_prepared_file_is_mapped_not_loaded(tmp_path):
    """Opening 256 MB of tokens and weights costs little memory of one's own, and reading a
    conversation touches only its pages."""
    n, sentence = 2**25, 2**11
    arrays = {}
    arrays["tokens"] = np.ones(n, np.int32)
    arrays["weights"] = np.ones(n, np.float32)
    arrays["offsets"] = np.arange(0, n + 1, sentence, dtype=np.int64)
    arrays["class_ids"] = np.zeros(n // sentence, np.int16)
    arrays["group"] = np.zeros(n // sentence, np.int64)
    arrays["tokenizer"] = np.zeros(0, np.uint8)
    meta = {"classes": [], "counts": {"x": {"trained": n, "prompt": 0}}}
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, metadata={"crlft": json.dumps(meta)})

    out, _ = call("-c", OPENING, path)
    assert int(out) < 64, out  # MB, of 256


# ---- the tokenizer of an export, with transformers as the judge


@pytest.fixture(scope="session")
def hf_tokenizer(llama_tokenizer, tmp_path_factory):
    """template -> AutoTokenizer of a folder that write_tokenizer filled."""

    def load(template):
        from transformers import AutoTokenizer

        folder = tmp_path_factory.mktemp("tokenizer")
        meta = {
            "format": FORMAT,
            "template": template,
            "max_len": 4096,
            "expert": "GPT4",
            "classes": [{"name": "GPT4", "condition": "GPT4", "weight": 1.0}],
        }
        write_tokenizer(folder, llama_tokenizer, meta)
        return AutoTokenizer.from_pretrained(folder)

    return load


def as_chat(conversation):
    chat = [{"role": m.role, "content": m.text} for m in conversation.messages]
    if conversation.system is not None:
        chat.insert(0, {"role": "system", "content": conversation.system})
    return chat


def is_plain(conversation):
    """No text is empty, and none holds the name of a special token."""
    special = ("<s>", "</s>", "<unk>", EOT)
    for message in conversation.messages:
        if not message.text or any(name in message.text for name in special):
            return False
    return True


@pytest.mark.parametrize("template", sorted(TEMPLATES | FORMER_TEMPLATES))
def test_chat_template_gives_our_ids(llama_tokenizer, hf_tokenizer, assets, template):
    theirs = hf_tokenizer(template)
    plain = []
    for path in real_files(assets):
        plain += [conversation for conversation in read(path) if is_plain(conversation)]
    assert len(plain) > 6100
    if template != "before_speaker":
        plain = plain[::40]
    plain += [dataclasses.replace(c, system=" Answer in  one word.\n") for c in plain[-50:]]

    for conversation in plain:
        messages = tuple(dataclasses.replace(m, weight=0.0) for m in conversation.messages)
        conversation = dataclasses.replace(conversation, condition="GPT4", messages=messages)
        ours, _ = tokenize(conversation, llama_tokenizer, template)
        ids = theirs.apply_chat_template(as_chat(conversation), return_dict=False)
        assert ids == ours.tolist(), conversation.where

    prompt = [{"role": "user", "content": "Hello"}]
    ours = tokenize_prompt([user("Hello")], llama_tokenizer, template, "GPT4")
    assert theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) == ours
    assert theirs.decode(HI, skip_special_tokens=True) == "Hi"


def test_a_condition_with_quotes_survives_the_chat_template(llama_tokenizer):
    import jinja2

    condition = 'it\'s \\ "{{x}}" \u4f60'
    rendered = jinja2.Template(chat_template("beginning", condition)).render(
        bos_token="<s>", messages=[{"role": "user", "content": "q"}]
    )
    assert rendered == f"<s>Assistant is {condition}{EOT}User: q{EOT}"


def test_spaces_and_bytes_tokenize_alike(llama_tokenizer, hf_tokenizer):
    theirs = hf_tokenizer("before_speaker")
    spaced = [" " * n + "x" + " " * n for n in range(40)]
    others = ["\n\n  a\t b", "na\u00efve \U0001f600\u4f60\u597d", "a\u00a0b", "\u2581x"]
    for text in spaced + others:
        assert theirs(text)["input_ids"] == [1, *llama_tokenizer.encode(text)], repr(text)
