"""evaluate.py: the official rules item by item, a tiny model through every subcommand, batches that
went wrong, win rates by counting."""

import hashlib
import json
import re
import statistics
import time

import pytest
import torch
from conftest import ROOT, call, refused, stopped_after

from conversations import Message
from evaluate import main
from evaluation.agieval import (
    TABLE_5,
    TASKS,
    agieval_items,
    agieval_letter,
    agieval_prompt,
    interval,
)
from evaluation.answers import TEMPERATURE, name_of
from evaluation.judge import JUDGE_PROMPTS, TABLE_6, fill, rating, winner
from evaluation.report import MT_CATEGORIES
from prompts import tokenize_prompt
from sample import SampleConfig, Speaker


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(*words):
    main([str(word) for word in words])


def cells_of(line):
    """The cells of a line of a markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


# ---- rules


def test_agieval_prompts_of_each_kind():
    item = {
        "passage": None,
        "question": "1 + 1?",
        "options": ["(A)1", "(B)2", "(C)3", "(D)4", "(E)5"],
    }
    assert (
        agieval_prompt(item)
        == "Q: 1 + 1? Answer Choices: (A)1 (B)2 (C)3 (D)4 (E)5\nA: Among A through E, the answer is"
    )
    item = {
        "passage": "It rains.",
        "question": "Wet?",
        "options": ["(A)yes", "(B)no", "(C)maybe", "(D)never"],
    }
    assert agieval_prompt(item) == (
        "It rains.Q: Wet? Answer Choices: (A)yes (B)no (C)maybe (D)never\n"
        "A: Among A through D, the answer is"
    )


# first eight hex digits of the prompt's sha256: the first, a middle and the last item of each task
HASHES = {
    "aqua-rat": "b6535ff8 d80998e8 52aa2b30",
    "logiqa-en": "37f0eea4 0a5971a5 b212de50",
    "lsat-ar": "3b050fda e9738295 2672235c",
    "lsat-lr": "078efe94 6a1d07a4 f859c6c8",
    "lsat-rc": "13725cd0 7c992fb7 f5902747",
    "sat-en-without-passage": "aa388d77 d156c71a a365f031",
    "sat-en": "e2dbe008 48c64bc8 da4d195d",
    "sat-math": "7d627ba8 c9684985 34d594bf",
}


def test_all_official_items_are_rendered(assets, tmp_path):
    out = tmp_path / "prompts.jsonl"
    call("evaluate.py", "agieval", "--data", assets / "agieval", "--out", out, "--prompts_only")
    rows = lines(out)
    assert len(rows) == 2546
    assert {row["label"] for row in rows} == set("ABCDE")
    for row in rows:
        assert row.keys() == {"task", "index", "prompt", "label"}

    for task, n in TASKS.items():
        mine = [row for row in rows if row["task"] == task]
        assert len(mine) == n
        assert [row["index"] for row in mine] == list(range(n))
        # aqua-rat and the LSAT's tasks have five options, all others four
        with_five = ["Among A through E," in row["prompt"] for row in mine]
        assert with_five == [task.startswith(("aqua", "lsat"))] * n

        digests = []
        for i in (0, n // 2, n - 1):
            digests.append(hashlib.sha256(mine[i]["prompt"].encode()).hexdigest()[:8])
        assert " ".join(digests) == HASHES[task]


def test_the_leftmost_letter_of_a_to_f_counts():
    for response, letter in (
        (" (B) because A", "B"),
        ("The answer is C.", "C"),
        ("An apple: D", "A"),
        ("none of these", None),
        ("", None),
        ("G then F", "F"),
        ("b) 2", None),
    ):
        assert agieval_letter(response) == letter


def test_table_5_s_averages_are_over_items():
    for cells in TABLE_5.values():
        correct = sum(round(share * n / 100) for share, n in zip(cells, TASKS.values()))
        assert round(100 * correct / 2546, 1) == cells[-1]
        if cells is TABLE_5["openchat-13b"]:
            assert correct == 928


def test_intervals_are_wilson_s():
    low, high = interval(928, 2546)
    # statsmodels' proportion_confint(928, 2546, method="wilson")
    assert abs(low - 0.3460) < 1e-4
    assert abs(high - 0.3834) < 1e-4


def test_verdicts():
    texts = ("Rating: [[7]]", "[5] but [[8.5]]", "so [6]", "ten", "[[x]]")
    assert [rating(text) for text in texts] == [7, 8.5, 6, -1, -1]
    assert [winner("I say [[A]]", game) for game in (1, 2)] == ["model_1", "model_2"]
    assert [winner("I say [[B]]", game) for game in (1, 2)] == ["model_2", "model_1"]
    assert winner("[[C]]", 1) == "tie"
    assert winner("A wins", 1) == "error"


CONVERSATION = [
    Message("user", "Hi </s>"),
    Message("assistant", "Hello!"),
    Message("user", "How are {text} you?"),
]
# as the labs' own code writes it; `</s>` typed by the user stays text, a number is that token
SPELLED = {
    "vicuna": [
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi </s> ASSISTANT: Hello!",
        2,
        "USER: How are {text} you? ASSISTANT:",
    ],
    "llama-2-chat": ["[INST] Hi </s> [/INST] Hello! ", 2, 1, "[INST] How are {text} you? [/INST]"],
    "guanaco": [
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.\n"
        "### Human: Hi </s>\n### Assistant: Hello!\n### Human: How are {text} you?\n### Assistant:"
    ],
    "ultralm": [
        "User: Hi </s>",
        2,
        "\nAssistant: Hello!",
        2,
        "\nUser: How are {text} you?",
        2,
        "\nAssistant:",
    ],
}


@pytest.mark.parametrize("template", SPELLED)
def test_templates_of_the_baselines(template, llama_tokenizer):
    ids = [1]
    for part in SPELLED[template]:
        ids += [part] if isinstance(part, int) else llama_tokenizer.encode(part)
    assert tokenize_prompt(CONVERSATION, llama_tokenizer, template, None) == ids


def test_templates_against_transformers(llama_tokenizer, assets):
    """What their own tokenizer makes of the spelled text."""
    from transformers import LlamaTokenizer

    theirs = LlamaTokenizer(str(assets / "llama2" / "tokenizer.model"), legacy=True)
    plain = [Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "How are you?")]
    for template, text in (
        ("llama-2-chat", "[INST] Hi [/INST] Hello! </s><s>[INST] How are you? [/INST]"),
        ("ultralm", "User: Hi</s>\nAssistant: Hello!</s>\nUser: How are you?</s>\nAssistant:"),
    ):
        assert tokenize_prompt(plain, llama_tokenizer, template, None) == theirs(text).input_ids
    system = tokenize_prompt(plain[:1], llama_tokenizer, "llama-2-chat", None, "Be brief.")
    assert system == theirs("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]").input_ids
    openchat = tokenize_prompt(plain, llama_tokenizer, "openchat", None)
    assert openchat == tokenize_prompt(plain, llama_tokenizer, "before_speaker", "GPT4")
    with pytest.raises(ValueError, match="no place for a system text"):
        tokenize_prompt(plain, llama_tokenizer, "ultralm", None, "Be brief.")


# ---- a tiny model through every subcommand


def exam_item(question, passage=None, options=("(A)a", "(B)b")):
    return {"passage": passage, "question": question, "options": options, "label": "A"}


@pytest.fixture
def exam(tmp_path):
    """Eight small task files."""
    for task in TASKS:
        write(tmp_path / f"{task}.jsonl", [exam_item("x?"), exam_item("y?"), exam_item("z?")])
    return tmp_path


def agieval_words(toy_run, exam, max_new):
    files = "--data", exam, "--out", exam / "out.jsonl"
    return "agieval", toy_run / "hf", *files, "--max_new", max_new


def test_agieval_answers_and_is_scored_again_from_its_file(toy_run, exam, capsys):
    out = exam / "out.jsonl"
    words = agieval_words(toy_run, exam, max_new=4)
    evaluate(*words)
    first = lines(out)
    said = capsys.readouterr()
    assert len(first) == 24
    assert "| average over items | 24 |" in said.out
    assert "the official file has 254" in said.err
    for row in first:
        assert row["letter"] == agieval_letter(row["response"])
    correct = sum(row["letter"] == "A" for row in first)
    assert f"| {correct / 24:.1%} |" in said.out

    evaluate("report", out)
    assert capsys.readouterr().out.splitlines()[-1] in said.out

    # a night of answers is not written over
    kept = out.read_bytes()
    assert "is there already" in refused(main, *words)
    assert "holds responses" in refused(main, *words, "--prompts_only")
    assert out.read_bytes() == kept
    assert {path.suffix for path in exam.iterdir()} == {".jsonl"}


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_of_agieval_goes_on_where_it_was_stopped(toy_run, exam, batches, monkeypatch):
    """Both passes: answers of few tokens, and those that went on without a letter."""
    monkeypatch.setattr("evaluation.agieval.FIRST_TOKENS", 2)
    monkeypatch.setattr(Speaker, "text", lambda self, ids: f"so {'B' if len(ids) > 2 else ids}")
    words = "agieval", toy_run / "hf", "--data", exam, "--batch", 10, "--out"
    evaluate(*words, exam / "whole.jsonl")
    out = exam / "out.jsonl"
    with stopped_after(batches, monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            evaluate(*words, out)
    assert not out.exists()
    evaluate(*words, out)
    assert out.read_bytes() == (exam / "whole.jsonl").read_bytes()


def test_agieval_names_what_is_wrong_and_leaves_other_files_alone(toy_run, exam):
    words = "agieval", toy_run / "hf", "--data", exam
    new = exam / "x.jsonl"
    partial = exam / "x.jsonl.partial"
    for text in ("a line without an end", '{"model": 1', "[1]\n", '{"task": "sat-en"}\n'):
        partial.write_text(text)
        assert "give another name" in refused(main, *words, "--out", new)
        assert partial.read_text() == text
    partial.unlink()
    no_data = refused(main, "agieval", toy_run / "hf", "--data", exam / "no", "--out", new)
    assert "no such file" in no_data
    no_model = refused(main, "agieval", "--data", exam, "--out", new)
    assert "give one model directory" in no_model
    assert "no such folder" in refused(main, *words, "--out", exam / "no" / "x.jsonl")
    write(exam / "sat-math.jsonl", [exam_item("?") | {"label": ["A"]}])
    assert "label = ['A'] is not a text" in refused(main, *words, "--out", new)
    write(exam / "sat-math.jsonl", [exam_item("?")])
    assert "at least 1" in refused(main, *words, "--out", new, "--batch", 0)
    write(exam / "sat-en.jsonl", [exam_item("?", options=None)])
    assert "options a list" in refused(main, *words, "--out", new)


def test_a_response_with_a_line_separator_can_be_resumed(toy_run, exam, monkeypatch):
    monkeypatch.setattr(Speaker, "text", lambda self, ids: "A\u2028B\u0085")
    words = agieval_words(toy_run, exam, max_new=1)
    with stopped_after(1, monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            evaluate(*words)
    evaluate(*words)
    assert (exam / "out.jsonl").read_text().count("\n") == 24


def test_a_response_without_a_letter_goes_on_to_the_end_of_the_context(toy_run, exam, monkeypatch):
    """Without --max_new: two tokens hold no letter here, more do."""
    real = Speaker.answer_each
    asked = []

    def answer_each(self, prompts, config, kept):
        asked.append((len(prompts), config.max_new, config.batch))
        return real(self, prompts, config, kept)

    monkeypatch.setattr("evaluation.agieval.FIRST_TOKENS", 2)
    monkeypatch.setattr(Speaker, "answer_each", answer_each)
    monkeypatch.setattr(Speaker, "text", lambda self, ids: "so B" if len(ids) > 2 else "so")
    speaker = Speaker(toy_run / "hf")
    monkeypatch.setattr("evaluation.agieval.load_speaker", lambda config: speaker)
    # this model never ends an answer
    speaker.stops = ()
    out = exam / "out.jsonl"
    evaluate("agieval", toy_run / "hf", "--data", exam, "--out", out)
    assert asked == [(24, 2, 16), (24, speaker.context, 4)]
    for row in lines(out):
        assert (row["letter"], row["max_new"]) == ("B", None)

    # with it, no token more
    asked.clear()
    words = agieval_words(toy_run, exam, max_new=2)
    evaluate(*words[:5], exam / "short.jsonl", *words[6:])
    assert asked == [(24, 2, 16)]
    assert {row["letter"] for row in lines(exam / "short.jsonl")} == {None}


def test_prompts_that_leave_no_room_lose_their_beginning_and_are_counted(toy_run, exam, capsys):
    write(exam / "sat-en.jsonl", [exam_item("?", passage="long " * 300)])
    words = agieval_words(toy_run, exam, max_new=3)
    with stopped_after(1, pytest.MonkeyPatch()):
        with pytest.raises(KeyboardInterrupt):
            evaluate(*words)
    # a run that goes on counts those of before, too
    evaluate(*words)
    assert "1 prompts cut on the left" in capsys.readouterr().out


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["sort c a b", "copy a"]},
    {"question_id": 111, "category": "math", "turns": ["copy a b", "reverse a b"]},
]
REFERENCE = {
    "question_id": 111,
    "model_id": "gpt-4",
    "choices": [{"index": 0, "turns": ["ref 1", "ref 2"]}],
}


@pytest.fixture
def answered(toy_run, tmp_path):
    """(question file, answers of model `one`, those of `two`); reference.jsonl beside them."""
    write(tmp_path / "reference.jsonl", [REFERENCE])
    questions = write(tmp_path / "question.jsonl", QUESTIONS)
    words = "answers", toy_run, "--bench", "mt", "--questions", questions, "--max_new", 8
    for name, seed in (("one", 0), ("two", 1)):
        evaluate(*words, "--out", tmp_path / f"{name}.jsonl", "--name", name, "--seed", seed)
    return questions, tmp_path / "one.jsonl", tmp_path / "two.jsonl"


def test_answers_have_two_turns_and_the_category_s_temperature(answered, toy_run, monkeypatch):
    questions, one, _ = answered
    rows = lines(one)
    assert [row["question_id"] for row in rows] == [81, 111]
    for row in rows:
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert len(row["choices"][0]["turns"]) == 2
        assert row["choices"][0]["index"] == 0

    asked = []
    real = Speaker.answer_each

    def answer_each(self, prompts, config, kept):
        asked.append((config.temperature, [self.text(ids) for ids in prompts]))
        return real(self, prompts, config, kept)

    monkeypatch.setattr(Speaker, "answer_each", answer_each)
    words = "answers", toy_run, "--bench", "mt", "--questions", questions
    evaluate(*words, "--out", one, "--max_new", 8)
    assert [temperature for temperature, _ in asked] == [0.0, 0.7, 0.0, 0.7]
    # the second turn sees the first
    first_answer = lines(one)[1]["choices"][0]["turns"][0]
    _, (second_prompt,) = asked[2]
    assert first_answer in second_prompt
    assert "reverse a b" in second_prompt
    assert TEMPERATURE["stem"] == TEMPERATURE["humanities"] == 0.1
    assert len(TEMPERATURE) == 8


def test_answers_go_on_where_they_were_stopped(answered, toy_run, tmp_path, monkeypatch, capsys):
    """Four lists of prompts, one at each temperature of each turn, and the second turn's prompts
    hold the first's answers."""
    questions, _, _ = answered
    monkeypatch.setattr("time.time", lambda: 1.0)
    words = "answers", toy_run, "--bench", "mt", "--questions", questions, "--max_new", 8
    evaluate(*words, "--out", tmp_path / "whole.jsonl", "--name", "m")
    out = tmp_path / "out.jsonl"
    words += "--out", out, "--name", "m"
    for batches in (2, 0, 1):
        with stopped_after(batches, monkeypatch):
            with pytest.raises(KeyboardInterrupt):
                evaluate(*words)
        said = capsys.readouterr().err
        assert f"answers are kept in {out}.partial; the same command goes on" in said
        assert not out.exists()
        assert "made with seed 0, not 1" in refused(main, *words, "--seed", 1)
    assert "going on after 3 answers" in said_by(capsys, *words)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def said_by(capsys, *words):
    """What a command that works says on stderr."""
    evaluate(*words)
    return capsys.readouterr().err


def test_alpaca_answers_and_the_warning_about_its_own_training_data(toy_run, toy, tmp_path, capsys):
    trained = json.loads((toy / "train.jsonl").read_text().splitlines()[0])
    prompt = trained["conversations"][0]["value"]
    questions = tmp_path / "alpaca.json"
    asked = [
        {"dataset": "helpful_base", "instruction": prompt},
        {"dataset": "koala", "instruction": "never seen"},
    ]
    questions.write_text(json.dumps(asked))
    out = tmp_path / "out.json"
    words = "answers", toy_run / "hf", "--bench", "alpaca", "--questions", questions
    evaluate(*words, "--out", out, "--max_new", 8)
    rows = json.loads(out.read_text())
    assert [row["dataset"] for row in rows] == ["helpful_base", "koala"]
    for row in rows:
        assert row.keys() == {"dataset", "instruction", "output", "generator"}
    warning = "1 of the 2 questions are prompts that this model was trained on"
    assert warning in capsys.readouterr().err
    assert name_of(toy_run / "hf") == toy_run.name


def test_answers_are_named_as_fastchat_names_the_model(toy_run, tmp_path, monkeypatch, capsys):
    """By the file: NAME.jsonl, where NAME is the run's; never over another benchmark's answers."""
    monkeypatch.chdir(tmp_path)
    questions = write(tmp_path / "question.jsonl", QUESTIONS[:1])
    words = "answers", toy_run / "hf", "--questions", questions, "--max_new", 2, "--bench", "mt"
    evaluate(*words)
    (row,) = lines(tmp_path / f"{toy_run.name}.jsonl")
    assert row["model_id"] == toy_run.name
    assert "is there already" in refused(main, *words)
    evaluate(*words, "--name", "mine")
    assert lines(tmp_path / "mine.jsonl")[0]["model_id"] == "mine"
    assert "FastChat" not in capsys.readouterr().out
    evaluate(*words, "--out", "other.jsonl")
    assert "FastChat will call this model other" in capsys.readouterr().out
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"dataset": "koala", "instruction": "copy a"}]))
    words = "answers", toy_run / "hf", "--questions", alpaca, "--max_new", 2, "--bench", "alpaca"
    evaluate(*words)
    assert json.loads((tmp_path / f"{toy_run.name}.json").read_text())


def test_answers_names_what_is_wrong(toy_run, tmp_path):
    questions = tmp_path / "alpaca.json"
    questions.write_text(json.dumps([{"dataset": "koala", "instruction": "never seen"}]))
    new = tmp_path / "x"
    words = "answers", toy_run, "--questions", questions
    assert "alpaca|mt|vicuna" in refused(main, *words, "--bench", "arena", "--out", new)
    alpaca = *words, "--bench", "alpaca", "--out"
    assert "is an input" in refused(main, *alpaca, questions)
    assert "--temperature" in refused(main, *alpaca, new, "--temperature", -1)

    mt = "answers", toy_run, "--bench", "mt", "--out", new, "--questions"
    assert "no 'turns'" in refused(main, *mt, questions)
    file = tmp_path / "q.jsonl"
    for turns in ([], None, "hello", [1], ["a", "b", "c"]):
        write(file, [{"question_id": 1, "category": "x", "turns": turns}])
        assert "one or two texts" in refused(main, *mt, file)
    file.write_text("")
    assert "empty" in refused(main, *mt, file)


# ---- the judge


# first eight hex digits of the sha256 of FastChat's own (system, blank line, user) with Q1, Q2, A1,
# A2, B1, B2, R1, R2 in the slots
PROMPT_HASHES = {
    "single-v1": "507129fa",
    "single-math-v1": "cb40d6ae",
    "single-v1-multi-turn": "01685415",
    "single-math-v1-multi-turn": "fd5b1c03",
    "pair-v2": "30ee7756",
    "pair-math-v1": "be6035ad",
    "pair-v2-multi-turn": "264a62bd",
    "pair-math-v1-multi-turn": "9f665d31",
}


def test_judge_prompts_are_fastchat_s_to_the_letter():
    texts = {}
    for name, letter in (("question", "Q"), ("answer", "A"), ("other", "B"), ("reference", "R")):
        for turn in (1, 2):
            texts[f"{name}_{turn}"] = f"{letter}{turn}"
    hashes = {}
    for name, system, user in JUDGE_PROMPTS.values():
        whole = f"{system}\n\n{fill(user, texts)}"
        hashes[name] = hashlib.sha256(whole.encode()).hexdigest()[:8]
    assert hashes == PROMPT_HASHES
    for (mode, turn, math), (name, _, _) in JUDGE_PROMPTS.items():
        assert name.startswith(mode)
        assert ("math" in name) == math
        assert ("multi" in name) == (turn == 2)
    assert hashlib.sha256(TABLE_6.encode()).hexdigest()[:8] == "18adae88"


def test_the_judge_prompts_name_their_source_and_licence():
    texts = json.loads((ROOT / "evaluation" / "judge_prompts.json").read_text())
    assert "github.com/lm-sys/FastChat" in texts["source"]
    assert "Apache License 2.0" in texts["licence"]
    licence = (ROOT / "evaluation" / "LICENSE-Apache-2.0.txt").read_text()
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]


def reply(key, text, status=200, error=None):
    """A line of a batch's output."""
    body = {"error": {"message": "later"}}
    if status == 200:
        body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return {
        "id": "b1",
        "custom_id": key,
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": error,
    }


def replies(asked, texts):
    return [reply(row["custom_id"], text) for row, text in zip(asked, texts)]


def asked_text(request):
    """What a request tells the judge as the user, after the system text."""
    return request["body"]["messages"][1]["content"]


def turns_of(path):
    """The turns of a model_answer file's first question."""
    return lines(path)[0]["choices"][0]["turns"]


@pytest.fixture
def single_requests(answered, tmp_path):
    """The request file for model `one`, graded alone."""
    questions, one, _ = answered
    requests = tmp_path / "requests.jsonl"
    words = "judge", one, "--mode", "single", "--questions", questions
    assert "give --references" in refused(main, *words, "--out", requests)
    evaluate(*words, "--references", tmp_path / "reference.jsonl", "--out", requests)
    return requests


def test_single_requests_hold_the_question_the_answer_and_the_reference(answered, single_requests):
    asked = lines(single_requests)
    assert len(asked) == 4
    for row in asked:
        assert row.keys() == {"custom_id", "method", "url", "body"}
        assert row["method"] == "POST"
        assert row["url"] == "/v1/chat/completions"
        assert row["body"].keys() == {"model", "messages", "temperature", "max_tokens"}
        assert row["body"]["model"] == "gpt-4"
        assert row["body"]["temperature"] == 0
        assert row["body"]["max_tokens"] == 2048
    # what each is about stands beside them, in a file of its own
    ids = lines(single_requests.with_name("requests.jsonl.ids.jsonl"))
    assert [row["custom_id"] for row in ids] == [row["custom_id"] for row in asked]
    assert [(row["prompt"], row["question"], row["turn"], row["model"]) for row in ids] == [
        ("single-v1", 81, 1, "one"),
        ("single-v1-multi-turn", 81, 2, "one"),
        ("single-math-v1", 111, 1, "one"),
        ("single-math-v1-multi-turn", 111, 2, "one"),
    ]
    assert "ref 1" in asked_text(asked[2])
    assert "ref 2" in asked_text(asked[3])
    first, second = turns_of(answered[1])
    assert f"[The Start of Assistant's Answer]\n{first}\n[The End" in asked_text(asked[0])
    for text in ("sort c a b", "copy a", first, second):
        assert text in asked_text(asked[1])


def test_single_grading_survives_a_batch_with_every_fault(single_requests, tmp_path, capsys):
    asked = lines(single_requests)
    keys = [row["custom_id"] for row in asked]
    batch = tmp_path / "batch.jsonl"
    output = [
        json.dumps(reply(keys[0], "Good.\u2028 Rating: [[7]]"), ensure_ascii=False),
        json.dumps(reply(keys[0], "Rating: [[1]]")),
        json.dumps(reply(keys[1], "", 429)),
        json.dumps(reply(keys[2], "I can't say.")),
        json.dumps(reply(keys[3], "", 500) | {"error": {"code": "x"}}),
        json.dumps(reply('["other"]', "[[3]]")),
        "{not json",
        json.dumps({"custom_id": ["a"]}),
        json.dumps({"custom_id": keys[1], "response": "oops"}),
        json.dumps(reply(keys[1], "Rating: [[4]]"))[:-20],
    ]
    # and one that is no UTF-8: U+FFFD is not what the judge said
    broken = json.dumps(reply(keys[1], "?[[5]]")).encode().replace(b"?", b"\xff")
    batch.write_bytes("\n".join(output).encode() + b"\n" + broken)
    out = tmp_path / "judgments.jsonl"
    capsys.readouterr()
    evaluate("judge", batch, "--requests", single_requests, "--out", out)
    said = capsys.readouterr().out
    assert "2 of 4 requests answered" in said
    assert "3 failed, 4 malformed, 1 doubled, 1 foreign, 1 unparsed; 2 to be asked again" in said

    # read by newlines alone: the judge's text has another line separator in it
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [(row["question_id"], row["turn"], row["model"], row["score"]) for row in rows] == [
        (81, 1, "one", 7.0),
        (111, 1, "one", -1),
    ]
    fields = {"question_id", "turn", "judge", "tstamp", "model"}
    assert rows[0].keys() == fields | {"user_prompt", "judgment", "score"}

    retry = tmp_path / "judgments.jsonl.retry.jsonl"
    assert lines(retry) == [asked[1], asked[3]]
    second = write(tmp_path / "batch2.jsonl", replies(lines(retry), ["[[9]]", "[[9]]"]))
    evaluate("judge", batch, second, "--requests", single_requests, "--out", out)
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [row["score"] for row in rows] == [7.0, -1, 9.0, 9.0]
    assert not retry.exists()

    # a score of -1 is left out, as show_result does
    evaluate("report", out)
    assert "| one | 7.00 | 9.00 | 8.33 |" in capsys.readouterr().out


def test_custom_ids_and_lines_are_what_every_endpoint_takes(tmp_path):
    """Anthropic's limit: 64 letters, digits, _ and -; and only ASCII, whatever the texts say."""
    model = "org/a very long name \u00e9 " + 100 * "x"
    answers = [
        {"question_id": 81, "model_id": model, "choices": [{"turns": ["caf\u00e9\u2028", "b"]}]},
        {"question_id": 111, "model_id": model, "choices": [{"turns": ["a", "b"]}]},
    ]
    baseline = [row | {"model_id": "base"} for row in answers]
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    references = write(tmp_path / "r.jsonl", [REFERENCE])
    out = tmp_path / "requests.jsonl"
    words = "judge", write(tmp_path / "a.jsonl", answers), "--mode", "pair", "--out", out
    words += "--questions", questions, "--references", references
    evaluate(*words, "--baseline", write(tmp_path / "b.jsonl", baseline))
    assert out.read_bytes().isascii()
    keys = [row["custom_id"] for row in lines(out)]
    assert len(set(keys)) == 8
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key)


def test_claude_is_asked_in_fastchat_s_form(answered, tmp_path):
    """What fschat 0.2.36's common.py sends, as one of the requests of Anthropic's batches."""
    questions, one, two = answered
    references = tmp_path / "reference.jsonl"
    out = tmp_path / "claude.jsonl"
    words = "judge", one, "--questions", questions, "--references", references
    words += "--judge", "claude-2", "--out", out
    fields = {"model", "messages", "temperature", "max_tokens", "stop_sequences"}

    # graded alone: the instructions are the system text, as for gpt-4
    evaluate(*words, "--mode", "single")
    for row, (_, system, _) in zip(lines(out), list(JUDGE_PROMPTS.values())[0:3:2]):
        params = row["params"]
        assert params["system"] == system
        assert params.keys() == fields | {"system"}
        (message,) = params["messages"]
        assert message["role"] == "user"

    # two compared: they stand before the question, and there is no system text
    evaluate(*words, "--mode", "pair", "--baseline", two)
    asked = lines(out)
    assert len(asked) == 8
    for row in asked:
        assert row.keys() == {"custom_id", "params"}
        params = row["params"]
        assert params.keys() == fields
        assert (params["model"], params["temperature"]) == ("claude-2", 0)
        assert params["max_tokens"] == 1024
        assert params["stop_sequences"] == ["\n\nHuman:"]
    _, system, _ = JUDGE_PROMPTS["pair", 1, False]
    (message,) = asked[0]["params"]["messages"]
    assert message["content"].startswith(f"[Instruction]\n{system}\n\n[User Question]\nsort c a b")

    # its results, one of them an error
    results = []
    for row in asked:
        content = [{"type": "text", "text": " [[A]]\n"}]
        result = {"type": "succeeded", "message": {"content": content}}
        results.append({"custom_id": row["custom_id"], "result": result})
    results[-1]["result"] = {"type": "errored", "error": {"type": "error"}}
    batch = write(tmp_path / "results.jsonl", results)
    judgments = tmp_path / "claude_pair.jsonl"
    evaluate("judge", batch, "--requests", out, "--out", judgments)
    rows = lines(judgments)
    assert len(rows) == 3
    assert rows[0]["judge"] == ["claude-2", "pair-v2"]
    assert rows[0]["g1_judgment"] == "[[A]]"
    assert rows[0]["g1_user_prompt"] == message["content"]
    assert lines(tmp_path / "claude_pair.jsonl.retry.jsonl") == asked[-1:]


# of four pairs, two games each: one wins; the orders disagree; two wins; both tie
VERDICTS = ["[[A]]", "[[B]]", "[[A]]", "[[A]]", "[[B]]", "[[A]]", "[[C]]", "[[C]]"]


@pytest.fixture
def pair_requests(answered, tmp_path):
    """The request file for model `one` against `two`."""
    questions, one, two = answered
    requests = tmp_path / "requests.jsonl"
    references = tmp_path / "reference.jsonl"
    words = "judge", one, "--mode", "pair", "--questions", questions, "--references", references
    assert "the baseline itself" in refused(
        main, *words, "--baseline", one, "--out", tmp_path / "x"
    )
    evaluate(*words, "--baseline", two, "--out", requests)
    return requests


def test_pairs_are_asked_in_both_orders(answered, pair_requests, tmp_path, capsys):
    _, one, two = answered
    asked = lines(pair_requests)
    assert len(asked) == 8
    # the second turn shows both conversations whole
    talk = asked_text(asked[2])
    for letter, path in (("A", one), ("B", two)):
        for text in turns_of(path):
            assert talk.count(f"### Assistant {letter}:\n{text}\n") >= 1
    answer_one = turns_of(one)[0]
    answer_two = turns_of(two)[0]
    for row, first, second in (
        (asked[0], answer_one, answer_two),
        (asked[1], answer_two, answer_one),
    ):
        assert f"Assistant A's Answer]\n{first}\n" in asked_text(row)
        assert f"Assistant B's Answer]\n{second}\n" in asked_text(row)

    batch = write(tmp_path / "batch.jsonl", replies(asked, VERDICTS))
    out = tmp_path / "judgments.jsonl"
    evaluate("judge", batch, "--requests", pair_requests, "--out", out)
    fields = {"question_id", "turn", "judge", "tstamp", "model_1", "model_2"}
    for game in ("g1", "g2"):
        fields |= {f"{game}_winner", f"{game}_user_prompt", f"{game}_judgment"}
    for row in lines(out):
        assert row.keys() == fields
    assert [(row["g1_winner"], row["g2_winner"]) for row in lines(out)] == [
        ("model_1", "model_1"),
        ("model_1", "model_2"),
        ("model_2", "model_2"),
        ("tie", "tie"),
    ]
    capsys.readouterr()
    evaluate("report", out)
    pairs = len(lines(out))
    line = f"{pairs} pairs are not against --baseline gpt-3.5-turbo, but of "
    assert line in capsys.readouterr().err
    evaluate("report", out, "--baseline", "two")
    assert "50.0% (1 won, 1 lost, 2 tied; gpt-4)" in capsys.readouterr().out


def test_a_pair_waits_for_its_other_game(pair_requests, tmp_path, capsys):
    """The first game of a pair is missing: asked again, the second kept."""
    asked = lines(pair_requests)
    lonely = write(tmp_path / "half.jsonl", replies(asked, VERDICTS)[1:])
    out = tmp_path / "judgments.jsonl"
    retry = tmp_path / "judgments.jsonl.retry.jsonl"
    capsys.readouterr()
    evaluate("judge", lonely, "--requests", pair_requests, "--out", out)
    assert len(lines(out)) == 3
    assert lines(retry) == asked[:1]
    assert "1 games wait for their other order" in capsys.readouterr().out

    # whatever is refused leaves both files as they are
    kept = out.read_bytes(), retry.read_bytes()
    words = "judge", lonely, "--requests"
    assert "outputs of all its batches" in refused(main, *words, retry, "--out", out)
    assert "is an input" in refused(main, *words, pair_requests, "--out", lonely)
    foreign = write(tmp_path / "foreign.jsonl", [asked[0] | {"custom_id": "7"}])
    new = tmp_path / "x"
    assert "keep the two together" in refused(main, *words, foreign, "--out", new)
    ids = tmp_path / "requests.jsonl.ids.jsonl"
    (tmp_path / "foreign.jsonl.ids.jsonl").write_bytes(ids.read_bytes())
    assert "'7' is not a request of" in refused(main, *words, foreign, "--out", new)
    write(foreign, [{"custom_id": asked[0]["custom_id"]}])
    assert "not a request that" in refused(main, *words, foreign, "--out", new)
    assert (out.read_bytes(), retry.read_bytes()) == kept


def test_the_judge_needs_a_baseline_and_whole_answers(answered, tmp_path):
    questions, one, _ = answered
    out = tmp_path / "judgments.jsonl"
    words = "judge", one, "--questions", questions, "--out", out
    assert "--baseline FILE" in refused(main, *words, "--mode", "pair")
    write(one, lines(one)[:1])
    single = *words, "--mode", "single", "--references", tmp_path / "reference.jsonl"
    assert "no whole answer to question 111" in refused(main, *single)


def chat_row(model, *texts):
    """A ShareGPT row: the user and the model by turns."""
    turns = []
    for i, text in enumerate(texts):
        turns.append({"from": ("human", "gpt")[i % 2], "value": text})
    return {"model": model, "conversations": turns}


def test_conversation_scoring_goes_turn_by_turn_in_context(tmp_path, capsys):
    chats = write(
        tmp_path / "chats.jsonl",
        [
            chat_row("GPT-4", "q1", "r1", "q2", "r2"),
            chat_row("GPT-4", "q3", "r3"),
            chat_row("GPT-3.5", "q4", "r4 {context}"),
        ],
    )
    requests = tmp_path / "requests.jsonl"
    out = tmp_path / "scores.jsonl"
    words = "judge", chats, "--mode", "conversation", "--out", requests
    evaluate(*words)
    asked = lines(requests)
    # Table 6 has no system text: the one message is the user's
    texts = [row["body"]["messages"][0]["content"] for row in asked]
    assert len(asked) == 4
    in_context = (
        "[Conversation]\nUser: q1\n\nAssistant: r1\n\nUser: q2\n\n"
        "[The Start of Assistant's Response]\nr2\n"
    )
    assert in_context in "".join(texts)
    assert any("r4 {context}" in text for text in texts)

    verdicts = []
    for text in texts:
        response = text.partition("Response]")[2]
        verdicts.append("Rating: [[9]]" if "r1" in response else "Rating: [[6]]")
    batch = write(tmp_path / "b.jsonl", replies(asked, verdicts))
    evaluate("judge", batch, "--requests", requests, "--out", out)
    capsys.readouterr()
    evaluate("report", out)
    rows = [cells_of(line) for line in capsys.readouterr().out.splitlines()]
    # 6 and the mean of 9 and 6, 7.5, which counts as 8
    assert rows[3][:3] == ["GPT-4", "2", "6.75"]
    assert rows[3][3:] == ["0", "0", "0", "0", "0", "1", "0", "1", "0", "0"]
    assert rows[2][:3] == ["GPT-3.5", "1", "6.00"]

    evaluate(*words, "--count", 1)
    assert 2 <= len(lines(requests)) <= 3


# ---- the report


def pair_row(question, g1, g2, model_1="m", model_2="gpt-3.5-turbo"):
    return {
        "question_id": question,
        "model_1": model_1,
        "model_2": model_2,
        "g1_winner": g1,
        "g2_winner": g2,
        "judge": ["gpt-4", "pair-v2"],
        "turn": 1,
    }


# 2 wins, 2 ties: 75%
MT_ROWS = [
    pair_row(81, "model_1", "model_1"),
    pair_row(82, "model_1", "tie"),
    pair_row(83, "tie", "tie"),
    pair_row(84, "error", "model_2"),
    pair_row(85, "model_2", "model_2", "gpt-3.5-turbo", "m"),
]
# 1 win, 1 loss: 50%
VICUNA_ROWS = [pair_row(1, "model_2", "model_2"), pair_row(2, "model_1", "model_1")]
# 1, 0.9, a draw, 0; the rest is no verdict
ALPACA_PREFERENCES = (2, 1.9, 0, 1, None, float("nan"), 3)


def test_report_counts_win_rates_and_averages_the_three(tmp_path, capsys):
    alpaca = []
    for i, preference in enumerate(ALPACA_PREFERENCES):
        alpaca.append(
            {
                "instruction": f"i{i}",
                "generator_1": "text_davinci_003",
                "generator_2": "m",
                "preference": preference,
                "annotator": "alpaca_eval_gpt",
            }
        )
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps(alpaca))
    mt = write(tmp_path / "mt.jsonl", MT_ROWS)
    vicuna = write(tmp_path / "v.jsonl", VICUNA_ROWS)
    evaluate("report", mt, vicuna, annotations)
    row = [
        "m",
        # alpaca_eval's own: win_rate 60.0, standard_error 22.73
        "60.0% +- 22.7 (2 won, 1 lost, 1 tied; alpaca_eval_gpt)",
        "75.0% (2 won, 0 lost, 2 tied; gpt-4)",
        "50.0% (1 won, 1 lost, 0 tied; gpt-4)",
        "61.7%",
    ]
    assert cells_of(capsys.readouterr().out.splitlines()[2]) == row

    # the same file twice: the mean is the same, over twice the judgments, as in show_result
    evaluate("report", mt, vicuna, annotations, mt)
    said = capsys.readouterr().out
    row[2] = "75.0% (4 won, 0 lost, 4 tied; gpt-4)"
    assert cells_of(said.splitlines()[2]) == row
    assert "14 judgments of 10 items; left out: 5 without a verdict" in said

    # judges stay apart
    lost = {"judge": ["claude-2", "pair-v2"], "g1_winner": "model_2", "g2_winner": "model_2"}
    other = write(tmp_path / "other.jsonl", [MT_ROWS[0] | lost])
    evaluate("report", mt, other)
    both = "75.0% (2 won, 0 lost, 2 tied; gpt-4) / 0.0% (0 won, 1 lost, 0 tied; claude-2)"
    assert both in capsys.readouterr().out


def test_alpaca_eval_has_a_column_for_each_reference(tmp_path, capsys):
    rows = []
    for reference, preference in (("text_davinci_003", 2), ("gpt4_turbo", 1)):
        rows.append(
            {
                "instruction": "i",
                "generator_1": reference,
                "generator_2": "m",
                "preference": preference,
                "annotator": "judge",
            }
        )
    mt = write(tmp_path / "mt.jsonl", MT_ROWS)
    vicuna = write(tmp_path / "v.jsonl", VICUNA_ROWS)
    alpaca = tmp_path / "a.json"
    alpaca.write_text(json.dumps(rows))
    evaluate("report", mt, vicuna, alpaca)
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert cells_of(head)[1:3] == [
        "AlpacaEval against gpt4_turbo",
        "AlpacaEval against text_davinci_003",
    ]
    assert [cell.split()[0] for cell in cells_of(row)[1:]] == [
        "0.0%",
        "100.0%",
        "75.0%",
        "50.0%",
        "75.0%",
    ]
    # an average with another reference than the paper's would not be Table 1's
    alpaca.write_text(json.dumps(rows[1:]))
    evaluate("report", mt, vicuna, alpaca)
    assert cells_of(capsys.readouterr().out.splitlines()[2])[-1] == ""


def test_judged_twice_is_averaged_as_show_result_does(tmp_path, capsys):
    """pandas' mean over the rows: of 4, 8 and 9 on turn 1, not of 8 and 9."""
    rows = [score_row(81, 1, 4), score_row(81, 1, 8), score_row(82, 1, 9), score_row(81, 2, 5)]
    rows += [score_row(81, 1, 6, "claude-2"), score_row(82, 1, 9, "claude-2")]
    evaluate("report", write(tmp_path / "s.jsonl", rows))
    said = capsys.readouterr().out
    assert "| m | 7.00 | 5.00 | 6.50 |" in said
    assert "6 judgments of 5 items" in said
    # judges are compared item by item: 6 and 6, 9 and 9
    assert "Pearson r = 1.00 over 2 common judgments" in said


def test_report_names_a_row_that_is_no_judgment(tmp_path):
    def report_of(row):
        return refused(main, "report", write(tmp_path / "x.jsonl", [row]))

    assert "not a judgment" in report_of({"a": 1})
    half = {key: value for key, value in MT_ROWS[0].items() if key != "g2_winner"}
    assert "no 'g2_winner'" in report_of(half)
    assert "no 'generator_1'" in report_of({"preference": 1})
    assert "judge is" in report_of(MT_ROWS[0] | {"judge": "gpt-4"})
    assert "FastChat's numbers" in report_of(MT_ROWS[0] | {"question_id": "abc"})
    for task, response in (("gaokao", "A"), ("sat-en", 5), ([], "A")):
        row = {"task": task, "label": "A", "response": response}
        assert "the --out of an agieval run" in report_of(row)
    # of another kind than it must be
    assert "turn = [1] is not a whole number" in report_of(MT_ROWS[0] | {"turn": [1]})
    assert "g1_winner = 'B' is not one of" in report_of(MT_ROWS[0] | {"g1_winner": "B"})
    assert "model_1 = 7 is not a text" in report_of(MT_ROWS[0] | {"model_1": 7})
    assert "FastChat's numbers" in report_of(MT_ROWS[0] | {"question_id": "\u00b2"})
    assert "FastChat's numbers" in report_of(MT_ROWS[0] | {"question_id": 10**400})


def test_scores_that_are_no_numbers_are_no_verdicts(tmp_path, capsys):
    rows = [score_row(81, 1, 4)]
    for score in (None, "9", True, float("nan"), float("inf"), 10**400, -1):
        rows.append(score_row(82, 1, score))
    evaluate("report", write(tmp_path / "s.jsonl", rows))
    said = capsys.readouterr().out
    assert "| m | 4.00 |  | 4.00 |" in said
    assert "1 judgments of 1 items; left out: 7 without a verdict" in said
    assert rating(f"[[{'9' * 400}]]") == -1


def test_a_line_of_ids_that_was_changed_is_refused(pair_requests, tmp_path):
    ids = tmp_path / "requests.jsonl.ids.jsonl"
    rows = lines(ids)
    write(ids, [rows[0] | {"model": "another"}, *rows[1:]])
    batch = write(tmp_path / "batch.jsonl", [])
    words = "judge", batch, "--requests", pair_requests, "--out", tmp_path / "x"
    assert "ids.jsonl:1: the line is not as `judge --mode` wrote it" in refused(main, *words)


def score_row(question, turn, score, judge="gpt-4"):
    return {
        "question_id": question,
        "model": "m",
        "judge": [judge, "single-v1"],
        "score": score,
        "turn": turn,
    }


def test_report_of_categories_and_turns(tmp_path, capsys):
    rows = [score_row(7, 1, 3)]
    for category in range(8):
        for turn in (1, 2):
            rows.append(score_row(81 + 10 * category, turn, category + turn))
    evaluate("report", write(tmp_path / "s.jsonl", rows))
    out = capsys.readouterr().out
    assert (
        "| turn 1 | turn 2 | average | writing | roleplay | reasoning | math | coding "
        "| extraction | stem | humanities |" in out
    )
    assert "| m | 4.50 | 5.50 | 5.00 | 1.50 | 2.50 | 3.50 | 4.50 | 5.50 | 6.50 | 7.50 | 8.50 |" in (
        out
    )
    assert "| m | 3.00 |  | 3.00 |" in out


def test_the_categories_and_temperatures_are_the_benchmark_s(assets):
    rows = lines(assets / "mt_bench" / "question.jsonl")
    assert len(rows) == 80
    for row in rows:
        assert row["category"] == MT_CATEGORIES[(row["question_id"] - 81) // 10]
    assert TEMPERATURE == {
        "writing": 0.7,
        "roleplay": 0.7,
        "math": 0,
        "coding": 0,
        "reasoning": 0,
        "extraction": 0,
        "stem": 0.1,
        "humanities": 0.1,
    }


def test_correlation_of_judges(tmp_path, capsys):
    rows = []
    for judge, scores in (("gpt-4", (1, 2, 3, 5)), ("claude-2", (2, 4, 5, 9))):
        for question, score in zip(range(81, 85), scores):
            rows.append(score_row(question, 1, score, judge))
    png = tmp_path / "s.png"
    evaluate("report", write(tmp_path / "j.jsonl", rows), "--png", png)
    r = torch.corrcoef(torch.tensor([[1.0, 2, 3, 5], [2, 4, 5, 9]]))[0, 1].item()
    agreement = f"claude-2 and gpt-4: Pearson r = {r:.2f} over 4 common judgments"
    assert agreement in capsys.readouterr().out
    assert png.stat().st_size > 1000
    # a name is no formula
    for row in rows:
        row["judge"] = [row["judge"][0] + r" $\foo$", *row["judge"][1:]]
    evaluate("report", write(tmp_path / "j.jsonl", rows), "--png", png)
    one = write(tmp_path / "one.jsonl", [row for row in rows if "gpt-4" in row["judge"][0]])
    assert "needs the judgments of two judges" in refused(main, "report", one, "--png", png)


def test_the_paper_s_cases_can_be_asked(toy_run, tmp_path):
    out = tmp_path / "out.jsonl"
    words = "sample.py", toy_run, "--input", ROOT / "paper" / "cases.jsonl", "--output", out
    call(*words, "--max_new", 4, "--truncate_left")
    tables = [row["case"][:7] for row in lines(out)]
    assert tables == ["Table 7", "Table 7", "Table 8", "Table 9"]


# ---- long: a real tokenizer, beside transformers


@pytest.fixture(scope="module")
def small_run(assets, tmp_path_factory):
    """`small` on the real tokenizer, after a few steps."""
    tmp_path = tmp_path_factory.mktemp("small")
    data = tmp_path / "d.safetensors"
    source = assets / "conversations" / "sharegpt_format.json"
    tokenizer = assets / "llama2" / "tokenizer.model"
    prepare = "data.py", "prepare", source, "--tokenizer", tokenizer, "--out", data
    call(*prepare, "--classes", "*=GPT4:1", "--max_len", 1024)
    train = "train.py", "--data", data, "--model", "small", "--out", tmp_path / "run"
    call(*train, "--steps", 12, "--batch_tokens", 2048)
    return tmp_path / "run" / "hf"


def clearly_best(theirs, prompt, got):
    """[len(got)] True up to where their two best logits are no more than 1e-3 apart."""
    logits = theirs(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1] > 1e-3).long().cumprod(0).bool()


@pytest.mark.long
def test_greedy_answers_to_agieval_are_transformers_own(assets, small_run):
    """50 official prompts, 24 tokens, wherever the two best logits are more than 1e-3 apart."""
    from transformers import AutoModelForCausalLM

    speaker = Speaker(small_run)
    theirs = AutoModelForCausalLM.from_pretrained(small_run).eval()
    speaker.stops = ()
    prompts = []
    for item in agieval_items(assets / "agieval")[::41]:
        ids = speaker.ids([Message("user", item["prompt"])], truncate_left=True, max_new=24)
        if len(ids) < 900:
            prompts.append(ids)
    prompts = prompts[:50]
    assert len(prompts) == 50

    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    compared = 0
    for batch in (1, 8):
        config = SampleConfig(temperature=0.0, max_new=24, batch=batch)
        for prompt, (got, _) in zip(prompts, speaker.answer_all(prompts, config)):
            with torch.no_grad():
                clear = clearly_best(theirs, prompt, got)
                out = theirs.generate(torch.tensor([prompt]), **how)[0, len(prompt) :]
            assert torch.equal(torch.tensor(got)[clear], out[clear])
            compared += clear.sum().item()
    assert compared > 50 * 24


def seconds_of(function):
    """CPU seconds of one call."""
    start = time.process_time()
    with torch.no_grad():
        function()
    return time.process_time() - start


@pytest.mark.long
def test_tokens_per_second_beside_generate(small_run, capsys):
    """One thread's CPU time, 96 greedy tokens after prompts of some 100; the median of five."""
    from transformers import AutoModelForCausalLM

    speaker = Speaker(small_run)
    theirs = AutoModelForCausalLM.from_pretrained(small_run).eval()
    speaker.stops = ()
    new = 96
    config = SampleConfig(temperature=0.0, max_new=new)
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    for batch, least in ((1, 1.6), (8, 1.15)):
        prompts = [[1, *range(1000 + 7 * i, 1100 + 8 * i)] for i in range(batch)]
        longest = max(len(ids) for ids in prompts)
        padding = [longest - len(ids) for ids in prompts]
        padded = torch.tensor([[0] * n + ids for n, ids in zip(padding, prompts)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])

        def ours(prompts=prompts):
            speaker.answer(prompts, config)

        def other(padded=padded, mask=mask):
            theirs.generate(padded, attention_mask=mask, **how)

        # by turns, so that a slow minute of the machine falls on both
        seconds = [(seconds_of(ours), seconds_of(other)) for _ in range(5)]
        our_rate, their_rate = (batch * new / statistics.median(x) for x in zip(*seconds))
        with capsys.disabled():
            print(
                f"\nbatch {batch}: {our_rate:.0f} tokens/s, generate {their_rate:.0f}: "
                f"{our_rate / their_rate:.2f} x"
            )
        assert our_rate > least * their_rate
