"""Who wrote an answer and how much it counts, in all the ways in which files say it.

Formats and kinds of files; then labels, conditions, weights, rewards and the expert, by the six
lines of docs/data.md; then what nobody may lose without a word.
"""

import dataclasses
import gzip
import json
import math
import os
import time
from itertools import chain, repeat

import pytest
from conftest import ROOT, refused
from test_data import TABLE, prepared, user

import data
from conversations import (
    MOST_CLASSES,
    Classes,
    Conversation,
    Message,
    glob_match,
    is_telling,
    parse,
    parse_classes,
    read,
    role_texts,
    tokenize,
)
from data import PrepareConfig, Prepared, account_lines
from support.makers import Account, Makers
from support.rows import read_chunks


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
        ('{"messages": [{"role": "system", "content": "x", "weight": 1}]}', "on a system message"),
        ('{"messages": [{"role": "user", "content": "x", "weight": true}]}', "weight True is not"),
        ('{"messages": [{"role": "user", "content": "x", "weight": "1"}]}', "weight '1' is not"),
        ('{"messages": [{"role": "user", "content": "x", "loss_weight": -1}]}', "loss_weight -1"),
        (
            '{"messages": [{"role": "assistant", "content": "x", "weight": 1, "loss_weight": 0}]}',
            "weight 1 and loss_weight 0; keep one",
        ),
        ('{"weight": 2e6, "messages": [{"role": "assistant", "content": "x"}]}', "row weight 2000"),
        ('{"instruction": "x"}', "output None is not a text"),
        ('{"instruction": "x", "output": "y", "input": 3}', "input 3 is not a text"),
        ('{"instruction": "x", "output": "y", "history": [["a", "b"]]}', "`history` is not read"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "a part of type 'image_url'; only text",
        ),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "a part of type 'x'"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "None is not a text"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "role .'user'. is not one of"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a character"),
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


def test_a_condition_that_looks_like_the_name_of_a_class_stops():
    """A prepared file counts each class under its name."""
    with pytest.raises(ValueError, match="two classes would have the name 'X:0.1'"):
        parse_classes("a=X:0.1:1,b=X:0.1,c=X:0.2")


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


RATINGS = ("reward", "score", "rating", "quality")
ASKED = {"role": "user", "content": "copy a"}
ANSWERED = {"role": "assistant", "content": "a"}


def row(*answers, **fields):
    """A row with one question and these answers; without any, one answer that has no weight."""
    return {"messages": [ASKED, *(answers or [ANSWERED])]} | fields


def answer(**fields):
    return ANSWERED | fields


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_all(config):
    """(conversations with weights, classes) of all files, as `prepare` has them."""
    makers = Makers(config, None, processes=1)
    highest = data.highest_reward(config, makers)
    maker = Makers(config, None, processes=1).maker
    maker.classes.highest_reward = highest
    conversations = []
    for path in config.files:
        for chunk in read_chunks(path):
            conversations += maker.conversations(chunk)
    return conversations, maker.classes


def account_of(conversations, classes):
    """What the metadata say of them."""
    account = Account(classes.decided_by)
    for conversation in conversations:
        account.see(conversation)
    return account.fields(classes.beta)


@pytest.fixture
def assigned(tmp_path):
    """(conversations with weights, classes) of some rows, under flags of `prepare`."""

    def of(*rows, **flags):
        path = write(tmp_path / "rows.jsonl", *rows)
        return read_all(PrepareConfig((path,), **flags))

    return of


@pytest.fixture
def answer_weights(assigned):
    """[weight] of all answers of some rows."""

    def of(*rows, **flags):
        conversations, _ = assigned(*rows, **flags)
        messages = chain.from_iterable(c.messages for c in conversations)
        return [m.weight for m in messages if m.role == "assistant"]

    return of


@pytest.fixture
def stop(toy, tmp_path):
    """The line with which `data.py prepare` refuses some rows; it leaves no file."""

    def of(*rows_and_flags):
        rows = [word for word in rows_and_flags if isinstance(word, dict)]
        flags = [word for word in rows_and_flags if not isinstance(word, dict)]
        path = write(tmp_path / "rows.jsonl", *rows)
        out = tmp_path / "x.safetensors"
        words = "--tokenizer", toy / "tokenizer.model", "--out", out, *flags
        line = refused(data.main, "prepare", path, *words)
        assert not out.exists()
        return line

    return of


def test_many_classes_are_found_at_once_and_too_many_are_refused_by_number():
    """The most that 16 bits hold, in the table and by the rows' own conditions: in linear time."""

    def table(classes):
        return ",".join(f"label {i}=class {i}:1" for i in range(classes)) + ",label*=rest:1"

    began = time.process_time()
    classes = Classes(parse_classes(table(MOST_CLASSES - 1)))
    assert len(classes.all) == MOST_CLASSES
    for i in (0, 1, 32_000):
        of_label = Conversation((user("q"),), f"label {i}")
        assert classes.all[classes.assign(of_label).class_id].name == f"class {i}"
    assert classes.class_of(Conversation((user("q"),), "label x")).name == "rest"
    with pytest.raises(ValueError, match="32,768 classes, and at most 32,767"):
        parse_classes(table(MOST_CLASSES))

    own = Classes()
    for i in range(MOST_CLASSES):
        assigned = own.assign(Conversation((user("q"),), condition=f"c{i}"))
        assert assigned.class_id == i
    with pytest.raises(ValueError, match="32,768 classes, and at most 32,767"):
        own.assign(Conversation((user("q"),), condition="one more"))
    # three times as many as one second is for, with room for a busy machine
    assert time.process_time() - began < 5


def test_labels_are_listed_with_their_classes(toy, tmp_path):
    rows = [row(model="Model: GPT-4"), row(model="two\nlines " + 99 * "x"), row(), row()]
    rows += [row(model=f"m{i}") for i in range(9)]
    source = write(tmp_path / "rows.jsonl", *rows)
    meta, _ = prepared(tmp_path, [source], toy / "tokenizer.model")
    lines = data.ledger_table(meta).splitlines()
    assert "Model: GPT-4 1 -> GPT4" in lines
    assert "(no label) 2 -> GPT3" in lines
    assert "two lines.. 1 -> GPT3" in lines
    # eight are listed
    assert "other labels 3 -> GPT3" in lines


# ---- kinds of files, and formats


def test_gzipped_lines_and_arrays_are_read_whatever_their_name(tmp_path):
    path = tmp_path / "any.name"
    rows = [SHAREGPT, OPENCHAT]
    for text in ("\n\n" + "\n".join(map(json.dumps, rows)), "\n" + json.dumps(rows, indent=1)):
        path.write_bytes(gzip.compress(text.encode()))
        got = read(path)
        assert [c.label for c in got] == ["Model: GPT-4", ""]
        assert got[1].messages[1].weight == 0.3
    path.write_bytes(gzip.compress(json.dumps(SHAREGPT).encode())[:-9])
    with pytest.raises(ValueError, match="any.name: a damaged gzip file"):
        read(path)
    # the line counts within, as an editor that unpacks it shows it
    path.write_bytes(gzip.compress(b"\n" + json.dumps(SHAREGPT).encode() + b"\n{"))
    with pytest.raises(ValueError, match="any.name:3: not JSON"):
        read(path)


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "any.name"
    # of different formats: every row of parquet has the fields of all, most of them None
    rows = [SHAREGPT, OPENCHAT, OPENAI, row(weight=0.5)]
    columns = {key: [one.get(key) for one in rows * 700] for key in set(chain(*rows))}
    parquet.write_table(pyarrow.table(columns), path)
    got = read(path)
    assert len(got) == 2800
    expected = [parse(row, "") for row in rows]
    for i, conversation in enumerate(got):
        where = f"{path}: row {i}"
        assert conversation == dataclasses.replace(expected[i % 4], where=where)

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="any.name: a damaged parquet file"):
        read(path)


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    # None stands for a module that is not there
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = tmp_path / "x.json"
    path.write_bytes(b"PAR1..")
    with pytest.raises(ValueError, match="x.json: .* pip install pyarrow"):
        read(path)


def test_an_alpaca_row_is_a_question_and_its_answer():
    def said(**fields):
        conversation = parse({"instruction": "Sort.", "output": "a b"} | fields, "")
        return [(m.role, m.text, m.weight) for m in conversation.messages]

    plain = [("user", "Sort.", None), ("assistant", "a b", None)]
    assert said() == said(input="") == said(input=None) == plain
    assert said(input="b a")[0] == ("user", "Sort.\n\nb a", None)
    # the turns go first
    assert said(messages=[ASKED, ANSWERED])[0] == ("user", "copy a", None)


def test_alpaca_evals_published_outputs_are_training_data(assigned):
    """With `dataset`, which is not who wrote them."""
    both = [
        {"dataset": "helpful_base", "instruction": "q", "output": "a", "generator": "gpt4_1106"},
        {"dataset": "koala", "instruction": "q", "output": "b", "generator": "alpaca-7b"},
    ]
    table = "gpt4*=GPT4:1.0,*=GPT3:0.1"
    conversations, _ = assigned(*both, classes=table, label="generator")
    assert [(c.condition, c.messages[1].weight) for c in conversations] == [
        ("GPT4", 1.0),
        ("GPT3", 0.1),
    ]


def test_parts_of_text_are_joined_by_newlines_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts[:1]},
    ]
    conversation = parse({"messages": messages}, "")
    assert conversation.system == "Be brief."
    assert [m.text for m in conversation.messages] == ["a\nb", "a"]


# ---- the six lines


def test_1_the_condition_is_the_rows_own_then_the_tables_then_none(assigned):
    conversations, classes = assigned(
        row(model="x", condition="Own", weight=1),
        row(model="x", condition=""),
        row(model="x"),
        classes="x=GPT4:1.0,*=GPT3:0.1",
    )
    assert [c.condition for c in conversations] == ["Own", "GPT4", "GPT4"]
    # without a table
    conversations, classes = assigned(row(weight=0.5), row(condition="", weight=0.5))
    assert [c.condition for c in conversations] == ["", ""]
    assert [c.name for c in classes.all] == ["none"]
    for condition in (None, ""):
        with pytest.raises(ValueError, match="rows.jsonl:1: label 'x' matches no class; .*classes"):
            assigned(row(model="x", weight=1, condition=condition))


@pytest.mark.parametrize("field", ["source", "generator", "origin", "dataset"])
def test_2_a_label_under_another_name_stops_and_is_read_by_its_name(assigned, field):
    labelled = row(**{field: "flan", "other": 3})
    with pytest.raises(ValueError) as error:
        assigned(row(model="Model: GPT-4"), labelled, classes=TABLE)
    assert f"rows.jsonl:2: no label, but {field} 'flan'" in str(error.value)
    assert f"--label {field}" in str(error.value)

    conversations, _ = assigned(labelled, classes="flan=A:1,*=B:0.1", label=field)
    assert conversations[0].condition == "A"
    # the default's name is then one of the others
    with pytest.raises(ValueError, match="rows.jsonl:2: no label, but model 'Model: GPT-4'"):
        assigned(labelled, row(model="Model: GPT-4"), classes=TABLE, label=field)


def test_2_a_label_is_asked_only_where_the_table_asks(assigned, stop):
    several = row(source="flan", dataset="x")
    with pytest.raises(ValueError, match="but source 'flan', dataset 'x'; .*--label source"):
        assigned(several, classes=TABLE)
    conversations, _ = assigned(several, classes="*=SFT:1")
    assert conversations[0].condition == "SFT"
    conversations, _ = assigned(several | {"condition": "GPT3"}, classes=TABLE)
    assert conversations[0].condition == "GPT3"
    line = stop(several, "--classes", "*=SFT:1", "--label", "sorce")
    assert "--label sorce: no row of" in line and "rows.jsonl has a text" in line


def test_3_an_answers_weight_is_its_own_then_the_rows_then_the_classes(assigned, answer_weights):
    rows = [
        row(answer(weight=0.7), answer(loss_weight=0.6), answer(), weight=0.5),
        row(answer(weight=0.4, loss_weight=0.4), answer(weight=None), model="x"),
        row(answer(weight=0)),
    ]
    table = "x=A:0.3,*=B:0.2"
    assert answer_weights(*rows, classes=table) == [0.7, 0.6, 0.5, 0.4, 0.3, 0.0]
    conversations, classes = assigned(*rows, classes=table)
    assert classes.decided_by == {"message": 4, "row": 1, "class": 1}
    (line,) = account_lines(account_of(conversations, classes))
    assert line == "weights of answers: 4 by the message, 1 by the row's weight, 1 by the class"


def test_3_a_users_weight_is_its_own_or_0(assigned):
    messages = [ASKED | {"weight": 0.5}, ANSWERED, ASKED, ANSWERED]
    conversations, classes = assigned({"messages": messages, "weight": 2}, classes="*=A:1")
    assert [m.weight for m in conversations[0].messages] == [0.5, 2, 0, 2]
    lines = account_lines(account_of(conversations, classes))
    assert "messages of users with a weight of their own: 1" in lines


def test_4_rewards_become_weights_beside_the_highest_of_all_files(tmp_path, assigned):
    rewards = [2.0, -1.0, 1e300]
    for i, reward in enumerate(rewards):
        write(tmp_path / f"{i}.jsonl", row(score=reward), row(answer(weight=0.25), score=None))
    files = tuple(str(tmp_path / f"{i}.jsonl") for i in (0, 1))
    conversations, classes = read_all(PrepareConfig(files, reward="score", beta=1.5))
    weights = [c.messages[1].weight for c in conversations]
    assert weights == [1.0, 0.25, pytest.approx(math.exp(-2)), 0.25]
    assert classes.decided_by == {"reward": 2, "message": 2}
    line = account_lines(account_of(conversations, classes))[-1]
    size = (1.5 + math.exp(-2)) ** 2 / (1 + 2 / 16 + math.exp(-4))
    assert line.startswith("rewards from -1 to 2, beta 1.5: effective sample size")
    assert line.endswith(f"{size:.1f} of 4 answers")

    # however far apart: no overflow, and what is far below the highest has the weight 0
    far = (*files, str(tmp_path / "2.jsonl"))
    conversations, _ = read_all(PrepareConfig(far, reward="score", beta=1e-300))
    assert [c.messages[1].weight for c in conversations][::2] == [0.0, 0.0, 1.0]


def test_4_the_tables_numbers_then_only_say_who_the_expert_is(assigned, answer_weights):
    rows = [row(model="x", r=1), row(r=0)]
    flags = {"classes": "x=A:0,*=B:1", "reward": "r", "beta": 1}
    assert answer_weights(*rows, **flags) == [1.0, pytest.approx(math.exp(-1))]
    _, classes = assigned(*rows, **flags)
    assert classes.expert().name == "B"


@pytest.mark.parametrize("table", ["B=B:-100,A=A:-90", "B=B:5,A=A:9"])
def test_4_then_they_are_no_weights(assigned, table):
    """Two that are so low that exp() gives 0 are not alike, and one may be as high as it likes."""
    rows = [row(model="A", r=1), row(model="B", r=0)]
    _, classes = assigned(*rows, classes=table, reward="r", beta=0.1)
    assert classes.expert().name == "A"
    with pytest.raises(ValueError, match="'.=.:.' gives the weight"):
        parse_classes("B=B:5,A=A:9", beta=0.1)


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, 10**400, [1]])
def test_4_a_row_that_needs_a_reward_and_has_no_finite_number_stops(assigned, value):
    flags = {"classes": "*=A:1", "reward": "score", "beta": 1.0}
    with pytest.raises(ValueError, match="rows.jsonl:2: --reward score: .* is not a finite number"):
        assigned(row(score=1), row(score=value), **flags)
    # one that does not need it may have anything
    conversations, _ = assigned(row(score=1), row(answer(weight=1), score=value), **flags)
    assert len(conversations) == 2


def test_4_flags_that_reach_nothing_or_say_two_things_stop(stop):
    both = row(weight=0.5, score=2)
    line = stop(both, "--reward", "score", "--beta", 1)
    assert "rows.jsonl:1: a row with weight 0.5 and score 2; keep one" in line
    assert "--reward score needs --beta" in stop(row(score=1), "--reward", "score")
    line = stop(row(answer(weight=1), score=1), "--reward", "score", "--beta", 1)
    assert "every answer of" in line and "has a weight of its own" in line
    assert "without --classes or --reward" in stop(row(weight=1), "--beta", 1)
    assert "--beta inf" in stop(row(), "--beta", "inf", "--classes", "*=A:1")


def test_4_the_reward_may_be_called_weight(answer_weights):
    rows = row(weight=-1), row(weight=-2)
    assert answer_weights(*rows, reward="weight", beta=1) == [1.0, pytest.approx(math.exp(-1))]


def test_5_the_expert_is_named_or_the_tables_highest_number(assigned):
    def expert(*rows, name=None, **flags):
        _, classes = assigned(*rows, **flags)
        return classes.expert(name).name

    table = {"classes": "x=A:1,y=B:2,*=A:2"}
    of_x = row(model="x")
    # a class that only rows name is no rival, whatever its weights
    own = row(answer(weight=9), condition="Own")
    assert expert(of_x, own, **table) == "B"
    assert expert(of_x, own, name="Own", **table) == "Own"
    assert expert(of_x, name="A:2.0", **table) == "A:2.0"
    # by its condition: the first of those that share it
    assert expert(of_x, name="A", **table) == "A:1.0"
    with pytest.raises(ValueError, match="--expert 'C' is not one of the classes A:1.0, B, A:2.0"):
        expert(of_x, name="C", **table)
    # without a table
    assert expert(own) == "Own"
    other = row(answer(weight=1), condition="Other")
    with pytest.raises(ValueError, match="classes Own, Other, .*--expert"):
        expert(own, other)
    assert expert(own, other, name="Other") == "Other"


def test_5_an_expert_without_conversations_stops_and_another_class_warns(toy, tmp_path, stop):
    rows = [row(model="gpt4"), *repeat(row(model="vicuna"), 2), row()]
    line = stop(*rows, "--classes", TABLE)
    assert "no conversation is of the expert's class GPT4; the labels are" in line
    assert "'vicuna' (2), 'gpt4' (1), '' (1); check --classes" in line
    # all of them dropped is as bad
    flags = "--classes", "gpt4=A:0,*=B:1", "--expert", "A"
    assert "every conversation of the expert's class A is dropped" in stop(*rows, *flags)

    source = write(tmp_path / "rows.jsonl", *rows)
    table = "gpt4=GPT4:1,gpt-3=GPT3:0.1,*=Other:0.1"
    meta, _ = prepared(tmp_path, [source], toy / "tokenizer.model", table)
    assert meta["expert"] == "GPT4"
    assert "warning: no conversation is of class GPT3;" in data.ledger_table(meta)
    assert data.ledger_table(meta).count("warning") == 1


def test_6_weight_0_is_context_and_only_an_empty_answer_with_a_weight_drops(toy, tmp_path):
    empty = {"role": "assistant", "content": " ", "weight": 0}
    messages = [ASKED, empty, ASKED, answer(weight=0), ASKED, answer(weight=1)]
    rows = [
        {"messages": messages},
        row(answer(weight=0)),
        {"messages": [ASKED, empty | {"weight": 0.1}, *messages]},
        {"messages": [ASKED, empty]},
    ]
    source = write(tmp_path / "rows.jsonl", *rows)
    meta, path = prepared(tmp_path, [source], toy / "tokenizer.model", "*=A:1")
    assert meta["counts"]["A"]["dropped_conversations"] == 3
    file = Prepared(path)
    assert len(file) == 1
    tokens, weights = file.conversation(0)
    whole, _ = tokenize(parse(rows[0] | {"condition": "A"}, ""), file.tokenizer)
    # nothing of the context is missing, and only the last answer is learned
    assert tokens.tolist() == whole.tolist()
    assert weights.tolist() == [0.0] * (len(weights) - 2) + [1.0, 1.0]


# ---- nothing is lost without a word


def test_what_looks_like_a_label_a_weight_or_a_reward_and_is_not_used_is_named(assigned):
    rows = [
        row(answer(reward=1, train=False), source="flan", quality=None, id="x", weight=1),
        row(answer(weight=1), source="flan", rating=3, weight=0.5, model="m", condition="GPT3"),
        row(answer(loss_scale=2), scores=[1]),
    ]
    conversations, classes = assigned(*rows, classes="*=A:1")
    found = account_of(conversations, classes)
    assert found["unread"] == {
        "source": 2,
        "a message's reward": 1,
        "a message's train": 1,
        # what went before them decided: the answer's own weight, the row's own condition
        "rating": 1,
        "weight": 1,
        "model": 1,
        "scores": 1,
        "a message's loss_scale": 1,
    }
    lines = account_lines(found)
    assert sum(line.startswith("not used: ") for line in lines) == 8
    assert any(line.startswith("not used: source (rows: 2);") for line in lines)


def test_what_is_used_or_looks_like_nothing_is_not_named(assigned):
    used = row(source="flan", score=1, id=3, language="en", resource="x", restrained=1)
    flags = {"classes": "flan=A:1", "label": "source", "reward": "score", "beta": 1}
    conversations, _ = assigned(used, **flags)
    assert conversations[0].unread == ()
    named = ("Reward", "avg_rating", "quality-score", "data_source", "weights")
    assert all(map(is_telling, named))


def test_show_says_the_same_as_prepare(toy, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", row(score=1), row(score=0, source="x"))
    flags = "--tokenizer", str(toy / "tokenizer.model"), "--reward", "score", "--beta", "1"
    data.main(["show", source, *flags])
    shown = capsys.readouterr().out
    out = str(tmp_path / "x.safetensors")
    data.main(["prepare", source, *flags, "--out", out])
    said = capsys.readouterr().out
    for line in (
        "weights of answers: 2 by the row's reward",
        "rewards from 0 to 1",
        "not used: source",
    ):
        assert line in shown and line in said
    # the file keeps it
    data.main(["show", out])
    assert "rewards from 0 to 1, beta 1" in capsys.readouterr().out
    # and so does the weight in the file
    assert Prepared(out).weights.max() == 1
    assert Prepared(out).weight_sums.tolist() == pytest.approx([2, 2 * math.exp(-1)])


def test_prepare_never_writes_over_an_input(toy, tmp_path):
    rows = (json.dumps(row()) + "\n").encode()
    source = tmp_path / "rows.safetensors"
    source.write_bytes(rows)
    model = tmp_path / "model.safetensors"
    model.write_bytes((toy / "tokenizer.model").read_bytes())
    (tmp_path / "soft.safetensors").symlink_to(source)
    os.link(source, tmp_path / "hard.safetensors")
    (tmp_path / "folder").mkdir()

    flags = "--tokenizer", model, "--classes", "*=A:1"
    names = "rows", "soft", "hard", "folder/../rows", "model"
    for name in names:
        out = tmp_path / f"{name}.safetensors"
        line = refused(data.main, "prepare", source, *flags, "--out", out)
        assert "is the input" in line and "give another name" in line, name
    assert source.read_bytes() == rows
    assert model.read_bytes() == (toy / "tokenizer.model").read_bytes()


# ---- the table of docs/data.md


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
# The first cell of a row: [(a row of data, flags, what comes of it)]. That is the last message's
# condition and weight, or what the error says, or the fields named as not used, in a list.
SPELLINGS = {
    "`model`": [(row(model="x"), {}, ("A", 0.5))],
    "`source`": [
        (row(source="x"), {"label": "source"}, ("A", 0.5)),
        (row(source="x"), {}, "no label, but source 'x'"),
    ],
    "`dataset`": [
        (row(dataset="x"), {"label": "dataset"}, ("A", 0.5)),
        (row(dataset="x"), {}, "no label, but dataset 'x'"),
    ],
    "`generator`": [
        (row(generator="x", dataset="y"), {"label": "generator"}, ("A", 0.5)),
        (row(generator="x"), {}, "no label, but generator 'x'"),
    ],
    "`origin`": [
        (row(origin="x"), {"label": "origin"}, ("A", 0.5)),
        (row(origin="x"), {}, "no label, but origin 'x'"),
    ],
    "`condition`": [(row(condition="B", model="x"), {}, ("B", 0.1))],
    "a message's `weight`": [(row(answer(weight=0.3), model="x"), {}, ("A", 0.3))],
    "a message's `loss_weight`": [
        (row(answer(loss_weight=0.3), model="x"), {}, ("A", 0.3)),
        (row(answer(loss_weight=0.3, weight=1)), {}, "weight 1 and loss_weight 0.3"),
    ],
    "a user's `weight`": [
        # the last message's weight is what is looked at
        ({"messages": [ASKED, ANSWERED, ASKED | {"weight": 0.3}]}, {}, ("B", 0.3)),
    ],
    "a system text's `weight`": [
        ({"messages": [{"role": "system", "content": "s", "weight": 0}, ANSWERED]}, {}, ("B", 0.1)),
        ({"messages": [{"role": "system", "content": "s", "weight": 1}, ANSWERED]}, {}, "weight 1"),
    ],
    "`weight`": [(row(weight=0.3, model="x"), {}, ("A", 0.3))],
    "`reward`, `score`, `rating`, `quality`": [
        *[(row(**{name: 3}), {"reward": name, "beta": 1}, ("B", 1.0)) for name in RATINGS],
        *[(row(**{name: 3}), {}, [name]) for name in RATINGS],
    ],
    "a message's `reward`, `loss`, `train`": [
        (row(answer(reward=1)), {}, ["a message's reward"]),
        (row(answer(loss=True)), {}, ["a message's loss"]),
        (row(answer(train=False)), {}, ["a message's train"]),
    ],
    "`instruction`, `input`, `output`": [
        ({"instruction": "q", "input": "i", "output": "a"}, {}, ("B", 0.1)),
    ],
    "`content` as a list": [
        (row(answer(content=[{"type": "text", "text": "a"}])), {}, ("B", 0.1)),
        (row(answer(content=IMAGE)), {}, "a part of type 'image_url'"),
    ],
    "role `developer`": [
        ({"messages": [{"role": "developer", "content": "s"}, ANSWERED]}, {}, ("B", 0.1)),
    ],
}


@pytest.mark.parametrize("field", SPELLINGS)
def test_a_row_of_the_table_of_spellings(assigned, field):
    for one, flags, expected in SPELLINGS[field]:
        flags = {"classes": "x=A:0.5,*=B:0.1"} | flags
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                assigned(one, **flags)
            continue
        (conversation,), _ = assigned(one, **flags)
        if isinstance(expected, list):
            assert [name for name, _ in conversation.unread] == expected
        else:
            assert (conversation.condition, conversation.messages[-1].weight) == expected


def test_the_table_of_spellings_is_the_tests():
    text = (ROOT / "docs" / "data.md").read_text()
    _, _, table = text.partition("| field | who writes so | what is made of it |\n|---|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == list(SPELLINGS)
