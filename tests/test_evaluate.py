"""evaluate.py: the official rules item by item, a tiny model through every subcommand, batches that went wrong, win rates by counting."""

import hashlib
import json
import statistics
import time

import pytest
import torch
from conftest import ROOT, call, refused

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
from evaluation.judge import PROMPTS, TABLE_6, fill, rating, winner
from evaluation.report import MT_CATEGORIES
from prompts import tokenize_prompt
from sample import Speaker


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert (
        agieval_prompt(item)
        == "It rains.Q: Wet? Answer Choices: (A)yes (B)no (C)maybe (D)never\nA: Among A through D, the answer is"
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
    call(
        "evaluate.py",
        "agieval",
        "--data",
        assets / "agieval",
        "--out",
        tmp_path / "prompts.jsonl",
        "--prompts_only",
    )
    rows = lines(tmp_path / "prompts.jsonl")
    assert len(rows) == 2546 and [
        sum(row["task"] == task for row in rows) for task in TASKS
    ] == list(TASKS.values())
    assert {row["label"] for row in rows} == set("ABCDE") and all(
        row.keys() == {"task", "index", "prompt", "label"} for row in rows
    )
    five = {
        task: sum("Among A through E," in row["prompt"] for row in rows if row["task"] == task)
        for task in TASKS
    }
    assert five == {
        task: n if task.startswith(("aqua", "lsat")) else 0 for task, n in TASKS.items()
    }
    digest = lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest()[:8]
    for task, n in TASKS.items():
        mine = [row for row in rows if row["task"] == task]
        assert [row["index"] for row in mine] == list(range(n))
        assert " ".join(digest(mine[i]) for i in (0, n // 2, n - 1)) == HASHES[task]


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
    assert (
        sum(round(share * n / 100) for share, n in zip(TABLE_5["openchat-13b"], TASKS.values()))
        == 928
    )


def test_intervals_are_wilson_s():
    low, high = interval(928, 2546)
    # statsmodels' proportion_confint(928, 2546, method="wilson")
    assert abs(low - 0.3460) < 1e-4 and abs(high - 0.3834) < 1e-4


def test_verdicts():
    assert [rating(t) for t in ("Rating: [[7]]", "[5] but [[8.5]]", "so [6]", "ten", "[[x]]")] == [
        7,
        8.5,
        6,
        -1,
        -1,
    ]
    assert [winner("I say [[A]]", game) for game in (1, 2)] == ["model_1", "model_2"]
    assert [winner("I say [[B]]", game) for game in (1, 2)] == ["model_2", "model_1"]
    assert winner("[[C]]", 1) == "tie" and winner("A wins", 1) == "error"


CONVERSATION = [
    Message("user", "Hi </s>"),
    Message("assistant", "Hello!"),
    Message("user", "How are {text} you?"),
]
SPELLED = {  # as the labs' own code writes it; `</s>` typed by the user stays text
    "vicuna": [
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi </s> ASSISTANT: Hello!",
        2,
        "USER: How are {text} you? ASSISTANT:",
    ],
    "llama-2-chat": ["[INST] Hi </s> [/INST] Hello! ", 2, 1, "[INST] How are {text} you? [/INST]"],
    "guanaco": [
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.\n"
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
    assert tokenize_prompt(plain, llama_tokenizer, "openchat", None) == tokenize_prompt(
        plain, llama_tokenizer, "before_speaker", "GPT4"
    )
    with pytest.raises(ValueError, match="no place for a system text"):
        tokenize_prompt(plain, llama_tokenizer, "ultralm", None, "Be brief.")


# ---- a tiny model through every subcommand


@pytest.fixture
def exam(tmp_path):
    """Eight small task files."""
    for task in TASKS:
        write(
            tmp_path / f"{task}.jsonl",
            [
                {"passage": None, "question": f"{q}?", "options": ["(A)a", "(B)b"], "label": "A"}
                for q in "xyz"
            ],
        )
    return tmp_path


def test_agieval_answers_resumes_and_is_scored_again_from_its_file(toy_run, exam, capsys):
    out = exam / "out.jsonl"
    words = "agieval", str(toy_run / "hf"), "--data", str(exam), "--out", str(out), "--max_new", "4"
    main(words)
    first, table = lines(out), capsys.readouterr()
    assert (
        len(first) == 24
        and "| average over items | 24 |" in table.out
        and "the official file has 254" in table.err
    )
    correct = sum(row["letter"] == "A" for row in first)
    main(["report", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] in table.out
    assert (
        all(row["letter"] == agieval_letter(row["response"]) for row in first)
        and f"| {correct / 24:.1%} |" in table.out
    )
    text = out.read_bytes()
    out.write_bytes(text[: len(text) // 2])  # killed in the middle of a line
    main(words)
    assert sorted(lines(out), key=str) == sorted(first, key=str)
    out.write_bytes(out.read_bytes() + b'{"ta')  # killed after its first letters
    main(words)
    assert sorted(lines(out), key=str) == sorted(first, key=str)
    kept = out.read_bytes()
    assert "give another --out" in refused(main, *words[:-1], 5)
    assert "holds responses" in refused(main, *words, "--prompts_only")
    write(
        exam / "sat-en.jsonl",
        [{"passage": None, "question": "other?", "options": ["(A)a", "(B)b"], "label": "A"}] * 3,
    )
    assert "to these questions" in refused(main, *words)
    assert out.read_bytes() == kept
    notes = exam / "notes.txt"
    for text in (
        "a line without an end",
        '{"model": 1',
        "[1]\n",
        '{"task": "sat-en", "index": 0}\n',
    ):
        notes.write_text(text)
        assert (
            "give another --out" in refused(main, *words[:4], "--out", notes)
            and notes.read_text() == text
        )
    assert "no such file" in refused(
        main, "agieval", toy_run / "hf", "--data", exam / "no", "--out", exam / "x.jsonl"
    )
    assert "give one model directory" in refused(
        main, "agieval", "--data", exam, "--out", exam / "x.jsonl"
    )
    assert "no such folder" in refused(main, *words[:4], "--out", exam / "no" / "x.jsonl")
    assert "at least 1" in refused(main, *words[:4], "--out", exam / "x.jsonl", "--batch", 0)
    write(
        exam / "sat-en.jsonl", [{"passage": None, "question": "?", "options": None, "label": "A"}]
    )
    assert "options a list" in refused(main, *words[:4], "--out", exam / "x.jsonl")


def test_a_response_with_a_line_separator_can_be_resumed(toy_run, exam, monkeypatch):
    out = exam / "out.jsonl"
    monkeypatch.setattr(Speaker, "text", lambda self, ids: "A\u2028B\u0085")
    words = "agieval", str(toy_run / "hf"), "--data", str(exam), "--out", str(out), "--max_new", "1"
    main(words)
    main(words)
    assert out.read_text().count("\n") == 24


def test_prompts_that_leave_no_room_lose_their_beginning_and_are_counted(toy_run, exam, capsys):
    write(
        exam / "sat-en.jsonl",
        [{"passage": "long " * 300, "question": "?", "options": ["(A)a", "(B)b"], "label": "A"}],
    )
    for _ in range(2):  # counted from the file: the second run has nothing to ask
        main(
            [
                "agieval",
                str(toy_run / "hf"),
                "--data",
                str(exam),
                "--out",
                str(exam / "o.jsonl"),
                "--max_new",
                "3",
            ]
        )
        assert "1 prompts cut on the left" in capsys.readouterr().out


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["sort c a b", "copy a"]},
    {"question_id": 111, "category": "math", "turns": ["copy a b", "reverse a b"]},
]


@pytest.fixture
def answered(toy_run, tmp_path):
    """(question file, answers of model `one`, answers of model `two`); reference.jsonl beside them."""
    write(
        tmp_path / "reference.jsonl",
        [
            {
                "question_id": 111,
                "model_id": "gpt-4",
                "choices": [{"index": 0, "turns": ["ref 1", "ref 2"]}],
            }
        ],
    )
    questions = write(tmp_path / "question.jsonl", QUESTIONS)
    for name, seed in (("one", 0), ("two", 1)):
        main(
            [
                "answers",
                str(toy_run),
                "--bench",
                "mt",
                "--questions",
                str(questions),
                "--out",
                str(tmp_path / f"{name}.jsonl"),
                "--name",
                name,
                "--seed",
                str(seed),
                "--max_new",
                "8",
            ]
        )
    return questions, tmp_path / "one.jsonl", tmp_path / "two.jsonl"


def test_answers_have_two_turns_and_the_category_s_temperature(answered, toy_run, monkeypatch):
    rows = lines(answered[1])
    assert [row["question_id"] for row in rows] == [81, 111] and all(
        row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for row in rows
    )
    assert all(
        len(row["choices"][0]["turns"]) == 2 and row["choices"][0]["index"] == 0 for row in rows
    )
    asked = []
    real = Speaker.answer_each
    monkeypatch.setattr(
        Speaker,
        "answer_each",
        lambda self, prompts, config: (
            asked.append((config.temperature, [self.text(p) for p in prompts]))
            or real(self, prompts, config)
        ),
    )
    main(
        [
            "answers",
            str(toy_run),
            "--bench",
            "mt",
            "--questions",
            str(answered[0]),
            "--out",
            str(answered[1]),
            "--max_new",
            "8",
        ]
    )
    assert [heat for heat, _ in asked] == [0.0, 0.7, 0.0, 0.7]
    second = lines(answered[1])[1]["choices"][0]["turns"]
    assert second[0] in asked[2][1][0] and "reverse a b" in asked[2][1][0], (
        "the second turn sees the first"
    )
    assert TEMPERATURE["stem"] == TEMPERATURE["humanities"] == 0.1 and len(TEMPERATURE) == 8


def test_alpaca_answers_and_the_warning_about_its_own_training_data(toy_run, toy, tmp_path, capsys):
    prompt = json.loads((toy / "train.jsonl").read_text().splitlines()[0])["conversations"][0][
        "value"
    ]
    questions = tmp_path / "alpaca.json"
    questions.write_text(
        json.dumps(
            [
                {"dataset": "helpful_base", "instruction": prompt},
                {"dataset": "koala", "instruction": "never seen"},
            ]
        )
    )
    main(
        [
            "answers",
            str(toy_run / "hf"),
            "--bench",
            "alpaca",
            "--questions",
            str(questions),
            "--out",
            str(tmp_path / "out.json"),
            "--max_new",
            "8",
        ]
    )
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["dataset"] for row in rows] == ["helpful_base", "koala"] and all(
        row.keys() == {"dataset", "instruction", "output", "generator"} for row in rows
    )
    assert (
        "1 of the 2 questions are prompts that this model was trained on" in capsys.readouterr().err
    )
    assert "alpaca|mt|vicuna" in refused(
        main,
        "answers",
        toy_run,
        "--bench",
        "arena",
        "--questions",
        questions,
        "--out",
        tmp_path / "x",
    )
    mt = "answers", toy_run, "--bench", "mt", "--out", tmp_path / "x", "--questions"
    assert "no 'turns'" in refused(main, *mt, questions)
    for turns in ([], None, "hello", [1], ["a", "b", "c"]):
        assert "one or two texts" in refused(
            main,
            *mt,
            write(tmp_path / "q.jsonl", [{"question_id": 1, "category": "x", "turns": turns}]),
        )
    (tmp_path / "q.jsonl").write_text("")
    assert "empty" in refused(main, *mt, tmp_path / "q.jsonl")
    assert "is an input" in refused(
        main, "answers", toy_run, "--bench", "alpaca", "--questions", questions, "--out", questions
    )
    assert "--temperature" in refused(
        main,
        "answers",
        toy_run,
        "--bench",
        "alpaca",
        "--questions",
        questions,
        "--out",
        tmp_path / "x",
        "--temperature",
        -1,
    )
    assert name_of(toy_run / "hf") == toy_run.name


# first eight hex digits of the sha256 of FastChat's own (system, blank line, user) with Q1, Q2, A1,
# A2, B1, B2, R1, R2 in the slots
JUDGE_PROMPTS = {
    "single-v1": "507129fa",
    "single-math-v1": "cb40d6ae",
    "single-v1-multi-turn": "01685415",
    "single-math-v1-multi-turn": "fd5b1c03",
    "pair-v2": "741fbbde",
    "pair-math-v1": "9b6f0b2a",
    "pair-v2-multi-turn": "43e647a1",
    "pair-math-v1-multi-turn": "df4b4e02",
}


def test_judge_prompts_are_fastchat_s_to_the_letter():
    slots = {
        f"{name}_{i}": f"{letter}{i}"
        for name, letter in (("question", "Q"), ("answer", "A"), ("other", "B"), ("reference", "R"))
        for i in (1, 2)
    }
    ours = {
        name: hashlib.sha256(f"{system}\n\n{fill(user, **slots)}".encode()).hexdigest()[:8]
        for name, system, user in PROMPTS.values()
    }
    assert ours == JUDGE_PROMPTS
    assert all(
        name.startswith(mode) and ("math" in name) == math and ("multi" in name) == (turn == 2)
        for (mode, turn, math), (name, *_) in PROMPTS.items()
    )
    assert hashlib.sha256(TABLE_6.encode()).hexdigest()[:8] == "18adae88"


def reply(key, text, status=200, error=None):
    body = (
        {"choices": [{"message": {"role": "assistant", "content": text}}]}
        if status == 200
        else {"error": {"message": "later"}}
    )
    return {
        "id": "b1",
        "custom_id": key,
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": error,
    }


def test_single_grading_survives_a_batch_with_every_fault(answered, tmp_path, capsys):
    questions, one, _ = answered
    requests = tmp_path / "requests.jsonl"
    words = "judge", str(one), "--mode", "single", "--questions", str(questions)
    assert "give --references" in refused(main, *words, "--out", requests)
    main([*words, "--references", str(tmp_path / "reference.jsonl"), "--out", str(requests)])
    asked = lines(requests)
    assert len(asked) == 4 and all(
        row.keys() == {"custom_id", "method", "url", "body"}
        and row["method"] == "POST"
        and row["url"] == "/v1/chat/completions"
        for row in asked
    )
    assert all(
        {k: v for k, v in row["body"].items() if k != "messages"}
        == {"model": "gpt-4", "temperature": 0, "max_tokens": 2048}
        for row in asked
    )
    assert [json.loads(row["custom_id"])[2] for row in asked] == [
        "single-v1",
        "single-v1-multi-turn",
        "single-math-v1",
        "single-math-v1-multi-turn",
    ]
    assert (
        "ref 1" in asked[2]["body"]["messages"][1]["content"]
        and "ref 2" in asked[3]["body"]["messages"][1]["content"]
    )
    said = lines(one)[0]["choices"][0]["turns"]
    assert (
        f"[The Start of Assistant's Answer]\n{said[0]}\n[The End"
        in asked[0]["body"]["messages"][1]["content"]
    )
    assert all(
        text in asked[1]["body"]["messages"][1]["content"]
        for text in ("sort c a b", "copy a", *said)
    )
    keys = [row["custom_id"] for row in asked]
    batch = tmp_path / "batch.jsonl"
    batch.write_text(
        "\n".join(
            [
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
        )
    )
    out = tmp_path / "judgments.jsonl"
    capsys.readouterr()
    main(["judge", str(batch), "--requests", str(requests), "--out", str(out)])
    text = capsys.readouterr().out
    assert (
        "2 of 4 requests answered" in text
        and "3 failed, 3 malformed, 1 doubled, 1 foreign, 1 unparsed; 2 to be asked again" in text
    )
    assert [
        (row["question_id"], row["turn"], row["model"], row["score"])
        for row in map(json.loads, out.read_text().split("\n")[:-1])
    ] == [(81, 1, "one", 7.0), (111, 1, "one", -1)]
    assert json.loads(out.read_text().split("\n")[0]).keys() == {
        "question_id",
        "turn",
        "judge",
        "tstamp",
        "model",
        "user_prompt",
        "judgment",
        "score",
    }
    retry = tmp_path / "judgments.jsonl.retry.jsonl"
    assert lines(retry) == [asked[1], asked[3]]
    second = write(
        tmp_path / "batch2.jsonl", [reply(row["custom_id"], "[[9]]") for row in lines(retry)]
    )
    main(["judge", str(batch), str(second), "--requests", str(requests), "--out", str(out)])
    assert [row["score"] for row in map(json.loads, out.read_text().split("\n")[:-1])] == [
        7.0,
        -1,
        9.0,
        9.0,
    ] and not retry.exists()
    main(["report", str(out)])  # a score of -1 is left out, as show_result does
    assert "| one | 7.00 | 9.00 | 8.33 |" in capsys.readouterr().out


def test_pairs_are_asked_in_both_orders(answered, tmp_path, capsys):
    questions, one, two = answered
    requests, out = tmp_path / "requests.jsonl", tmp_path / "judgments.jsonl"
    words = (
        "judge",
        str(one),
        "--mode",
        "pair",
        "--questions",
        str(questions),
        "--references",
        str(tmp_path / "reference.jsonl"),
        "--baseline",
    )
    main([*words, str(two), "--out", str(requests)])
    asked = lines(requests)
    assert len(asked) == 8 and "the baseline itself" in refused(
        main, *words, one, "--out", tmp_path / "x"
    )
    turns = [lines(path)[0]["choices"][0]["turns"] for path in (one, two)]
    talk = asked[2]["body"]["messages"][1]["content"]
    assert all(
        talk.count(f"### Assistant {x}:\n{text}\n") >= 1
        for x, said in zip("AB", turns)
        for text in said
    )
    a, b = (lines(path)[0]["choices"][0]["turns"][0] for path in (one, two))
    for row, first, second in ((asked[0], a, b), (asked[1], b, a)):
        assert (
            f"Assistant A's Answer]\n{first}\n" in row["body"]["messages"][1]["content"]
            and f"Assistant B's Answer]\n{second}\n" in row["body"]["messages"][1]["content"]
        )
    # one wins; the orders disagree; two wins; both tie
    verdicts = ["[[A]]", "[[B]]", "[[A]]", "[[A]]", "[[B]]", "[[A]]", "[[C]]", "[[C]]"]
    batch = write(
        tmp_path / "batch.jsonl", [reply(row["custom_id"], v) for row, v in zip(asked, verdicts)]
    )
    main(["judge", str(batch), "--requests", str(requests), "--out", str(out)])
    assert all(
        row.keys()
        == {
            "question_id",
            "turn",
            "judge",
            "tstamp",
            "model_1",
            "model_2",
            "g1_winner",
            "g2_winner",
            "g1_user_prompt",
            "g1_judgment",
            "g2_user_prompt",
            "g2_judgment",
        }
        for row in lines(out)
    )
    assert [(row["g1_winner"], row["g2_winner"]) for row in lines(out)] == [
        ("model_1", "model_1"),
        ("model_1", "model_2"),
        ("model_2", "model_2"),
        ("tie", "tie"),
    ]
    capsys.readouterr()
    main(["report", str(out), "--baseline", "two"])
    assert "50.0% (1 won, 1 lost, 2 tied; gpt-4)" in capsys.readouterr().out
    # the first game of a pair is missing: asked again, the second kept
    lonely = write(tmp_path / "half.jsonl", lines(batch)[1:])
    capsys.readouterr()
    main(["judge", str(lonely), "--requests", str(requests), "--out", str(out)])
    retry = tmp_path / "judgments.jsonl.retry.jsonl"
    assert (
        len(lines(out)) == 3
        and lines(retry) == asked[:1]
        and "1 games wait for their other order" in capsys.readouterr().out
    )
    kept = out.read_bytes(), retry.read_bytes()
    assert "outputs of all its batches" in refused(
        main, "judge", lonely, "--requests", retry, "--out", out
    )
    assert "is an input" in refused(main, "judge", lonely, "--requests", requests, "--out", lonely)
    assert "not a request" in refused(
        main,
        "judge",
        lonely,
        "--requests",
        write(tmp_path / "foreign.jsonl", [{"custom_id": "x", "body": {}}]),
        "--out",
        tmp_path / "x",
    )
    for key in ("[1, 2]", '["pair", "gpt-4", "n", 1, 1, "m"]', "[[], 1, 2, 3, 4, 5]", "7", 7):
        assert "not a request" in refused(
            main,
            "judge",
            lonely,
            "--requests",
            write(tmp_path / "foreign.jsonl", [{"custom_id": key, "body": {}}]),
            "--out",
            tmp_path / "x",
        )
    assert (out.read_bytes(), retry.read_bytes()) == kept
    assert "--baseline FILE" in refused(
        main, "judge", one, "--mode", "pair", "--questions", questions, "--out", out
    )
    write(one, lines(one)[:1])
    assert "no whole answer to question 111" in refused(
        main,
        "judge",
        one,
        "--mode",
        "single",
        "--questions",
        questions,
        "--references",
        tmp_path / "reference.jsonl",
        "--out",
        out,
    )


def test_conversation_scoring_goes_turn_by_turn_in_context(tmp_path, capsys):
    chat = lambda model, *texts: {
        "model": model,
        "conversations": [
            {"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)
        ],
    }
    chats = write(
        tmp_path / "chats.jsonl",
        [
            chat("GPT-4", "q1", "r1", "q2", "r2"),
            chat("GPT-4", "q3", "r3"),
            chat("GPT-3.5", "q4", "r4 {context}"),
        ],
    )
    requests, out = tmp_path / "requests.jsonl", tmp_path / "scores.jsonl"
    main(["judge", str(chats), "--mode", "conversation", "--out", str(requests)])
    asked = lines(requests)
    texts = [row["body"]["messages"][0]["content"] for row in asked]
    assert (
        len(asked) == 4
        and "[Conversation]\nUser: q1\n\nAssistant: r1\n\nUser: q2\n\n[The Start of Assistant's Response]\nr2\n"
        in "".join(texts)
    )
    assert any("r4 {context}" in text for text in texts)
    batch = write(
        tmp_path / "b.jsonl",
        [
            reply(
                row["custom_id"], f"Rating: [[{9 if 'r1' in t.partition('Response]')[2] else 6}]]"
            )
            for row, t in zip(asked, texts)
        ],
    )
    main(["judge", str(batch), "--requests", str(requests), "--out", str(out)])
    capsys.readouterr()
    main(["report", str(out)])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    # 6 and the mean of 9 and 6, 7.5
    assert ["GPT-4", "2", "6.75"] == rows[3][:3] and rows[3][3:] == ["0"] * 5 + [
        "1",
        "0",
        "1",
        "0",
        "0",
    ]
    assert ["GPT-3.5", "1", "6.00"] == rows[2][:3]
    main(["judge", str(chats), "--mode", "conversation", "--count", "1", "--out", str(requests)])
    assert 2 <= len(lines(requests)) <= 3


def test_report_counts_win_rates_and_averages_the_three(tmp_path, capsys):
    pair = lambda q, g1, g2, m1="m", m2="gpt-3.5-turbo": {
        "question_id": q,
        "model_1": m1,
        "model_2": m2,
        "g1_winner": g1,
        "g2_winner": g2,
        "judge": ["gpt-4", "pair-v2"],
        "turn": 1,
    }
    mt = [
        pair(81, "model_1", "model_1"),
        pair(82, "model_1", "tie"),
        pair(83, "tie", "tie"),
        pair(84, "error", "model_2"),
        pair(85, "model_2", "model_2", "gpt-3.5-turbo", "m"),
    ]
    # 2 wins, 2 ties: 75%; 1 win, 1 loss: 50%
    vicuna = [pair(1, "model_2", "model_2"), pair(2, "model_1", "model_1")]
    # 1, 0.9, a draw, 0; the rest is no verdict
    alpaca = [
        {
            "instruction": f"i{i}",
            "generator_1": "text_davinci_003",
            "generator_2": "m",
            "preference": p,
            "annotator": "alpaca_eval_gpt",
        }
        for i, p in enumerate((2, 1.9, 0, 1, None, float("nan"), 3))
    ]
    (tmp_path / "a.json").write_text(json.dumps(alpaca))
    files = (
        write(tmp_path / "mt.jsonl", mt),
        write(tmp_path / "v.jsonl", vicuna),
        tmp_path / "a.json",
    )
    main(["report", *map(str, files)])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    table = [
        "m",
        "60.0% (2 won, 1 lost, 1 tied; alpaca_eval_gpt)",
        "75.0% (2 won, 0 lost, 2 tied; gpt-4)",
        "50.0% (1 won, 1 lost, 0 tied; gpt-4)",
        "61.7%",
    ]
    assert cells == table
    main(["report", *map(str, files), str(files[0])])  # the same file twice counts once
    text = capsys.readouterr().out
    assert [
        cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]
    ] == table and "left out: 5 without a verdict, 4 doubled" in text
    other = write(
        tmp_path / "other.jsonl",
        [
            row | {"judge": ["claude-2", "pair-v2"], "g1_winner": "model_2", "g2_winner": "model_2"}
            for row in mt[:1]
        ],
    )
    main(["report", str(files[0]), str(other)])  # judges stay apart
    assert (
        "75.0% (2 won, 0 lost, 2 tied; gpt-4) / 0.0% (0 won, 1 lost, 0 tied; claude-2)"
        in capsys.readouterr().out
    )
    bad = lambda row: refused(main, "report", write(tmp_path / "x.jsonl", [row]))
    assert (
        "not a judgment" in bad({"a": 1})
        and "no 'g2_winner'" in bad({k: v for k, v in mt[0].items() if k != "g2_winner"})
        and "no 'generator_1'" in bad({"preference": 1})
    )
    assert "judge is" in bad(mt[0] | {"judge": "gpt-4"}) and "FastChat's numbers" in bad(
        mt[0] | {"question_id": "abc"}
    )
    assert all(
        "the --out of an agieval run" in bad({"task": task, "label": "A", "response": response})
        for task, response in (("gaokao", "A"), ("sat-en", 5), ([], "A"))
    )


def test_report_of_categories_and_turns(tmp_path, capsys):
    single = lambda q, turn, score: {
        "question_id": q,
        "model": "m",
        "judge": ["gpt-4", "single-v1"],
        "score": score,
        "turn": turn,
    }
    rows = [single(81 + 10 * i, turn, i + turn) for i in range(8) for turn in (1, 2)] + [
        single(7, 1, 3)
    ]
    main(["report", str(write(tmp_path / "s.jsonl", rows))])
    out = capsys.readouterr().out
    assert (
        "| turn 1 | turn 2 | average | writing | roleplay | reasoning | math | coding | extraction | stem | humanities |"
        in out
    )
    assert (
        "| m | 4.50 | 5.50 | 5.00 | 1.50 | 2.50 | 3.50 | 4.50 | 5.50 | 6.50 | 7.50 | 8.50 |" in out
        and "| m | 3.00 |  | 3.00 |" in out
    )


def test_the_categories_and_temperatures_are_the_benchmark_s(assets):
    rows = lines(assets / "mt_bench" / "question.jsonl")
    assert (
        all(row["category"] == MT_CATEGORIES[(row["question_id"] - 81) // 10] for row in rows)
        and len(rows) == 80
    )
    heat = {
        "writing": 0.7,
        "roleplay": 0.7,
        "math": 0,
        "coding": 0,
        "reasoning": 0,
        "extraction": 0,
        "stem": 0.1,
        "humanities": 0.1,
    }
    assert TEMPERATURE == heat


def test_correlation_of_judges(tmp_path, capsys):
    rows = [
        {"question_id": q, "model": "m", "judge": [judge, "single-v1"], "score": s, "turn": 1}
        for judge, scores in (("gpt-4", (1, 2, 3, 5)), ("claude-2", (2, 4, 5, 9)))
        for q, s in zip(range(81, 85), scores)
    ]
    main(["report", str(write(tmp_path / "j.jsonl", rows)), "--png", str(tmp_path / "s.png")])
    r = torch.corrcoef(torch.tensor([[1.0, 2, 3, 5], [2, 4, 5, 9]]))[0, 1].item()
    assert (
        f"claude-2 and gpt-4 (Fig. 8, 9): Pearson r = {r:.2f} over 4 common judgments"
        in capsys.readouterr().out
        and (tmp_path / "s.png").stat().st_size > 1000
    )


def test_the_paper_s_cases_can_be_asked(toy_run, tmp_path):
    call(
        "sample.py",
        toy_run,
        "--input",
        ROOT / "paper" / "cases.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--max_new",
        4,
        "--truncate_left",
    )
    assert [row["case"][:7] for row in lines(tmp_path / "out.jsonl")] == [
        "Table 7",
        "Table 7",
        "Table 8",
        "Table 9",
    ]


@pytest.fixture(scope="module")
def small_run(assets, tmp_path_factory):
    """`small` on the real tokenizer, after a few steps."""
    tmp_path = tmp_path_factory.mktemp("small")
    call(
        "data.py",
        "prepare",
        assets / "conversations" / "sharegpt_format.json",
        "--tokenizer",
        assets / "llama2" / "tokenizer.model",
        "--out",
        tmp_path / "d.safetensors",
        "--classes",
        "*=GPT4:1",
        "--max_len",
        1024,
    )
    call(
        "train.py",
        "--data",
        tmp_path / "d.safetensors",
        "--model",
        "small",
        "--out",
        tmp_path / "run",
        "--steps",
        12,
        "--batch_tokens",
        2048,
    )
    return tmp_path / "run" / "hf"


@pytest.mark.long
def test_greedy_answers_to_agieval_are_transformers_own(assets, small_run):
    """50 official prompts, 24 tokens, wherever the two best logits are more than 1e-3 apart."""
    from transformers import AutoModelForCausalLM

    from sample import SampleConfig, Speaker

    speaker, theirs = Speaker(small_run), AutoModelForCausalLM.from_pretrained(small_run).eval()
    speaker.stops = ()
    items = agieval_items(assets / "agieval")[::41]
    prompts = [
        ids
        for item in items
        if len(
            ids := speaker.ids([Message("user", item["prompt"])], truncate_left=True, max_new=24)
        )
        < 900
    ][:50]
    compared = 0
    for batch in (1, 8):
        for prompt, (got, _) in zip(
            prompts,
            speaker.answer_all(prompts, SampleConfig(temperature=0.0, max_new=24, batch=batch)),
        ):
            with torch.no_grad():
                best = (
                    theirs(torch.tensor([prompt + got]))
                    .logits[0, len(prompt) - 1 : -1]
                    .topk(2)
                    .values
                )
                out = theirs.generate(
                    torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
                )[0, len(prompt) :]
            clear = (best[:, 0] - best[:, 1] > 1e-3).long().cumprod(0).bool()
            assert torch.equal(torch.tensor(got)[clear], out[clear])
            compared += clear.sum().item()
    assert len(prompts) == 50 and compared > 50 * 24


@pytest.mark.long
def test_tokens_per_second_beside_generate(small_run, capsys):
    """CPU seconds of one thread, 96 greedy tokens after prompts of some 100, in turn; the median of five."""
    from transformers import AutoModelForCausalLM

    from sample import SampleConfig, Speaker

    speaker, theirs = Speaker(small_run), AutoModelForCausalLM.from_pretrained(small_run).eval()
    speaker.stops, new = (), 96
    for batch, least in ((1, 1.6), (8, 1.15)):
        prompts = [[1, *range(1000 + 7 * i, 1100 + 8 * i)] for i in range(batch)]
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        ours = lambda: speaker.answer(prompts, SampleConfig(temperature=0.0, max_new=new))  # noqa: B023
        other = lambda: theirs.generate(
            padded,  # noqa: B023
            attention_mask=mask,  # noqa: B023
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = []
        for f in (ours, other) * 5:
            start = time.process_time()
            with torch.no_grad():
                f()
            seconds.append(time.process_time() - start)
        rates = [batch * new / statistics.median(seconds[i::2]) for i in (0, 1)]
        with capsys.disabled():
            print(
                f"\nbatch {batch}: {rates[0]:.0f} tokens/s, generate {rates[1]:.0f}: {rates[0] / rates[1]:.2f} x"
            )
        assert rates[0] > least * rates[1]
