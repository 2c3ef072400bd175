"""What the two READMEs say: every CPU command runs as printed, equations are where the tables put them, tables are the results' own."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from data import PrepareConfig, prepare
from evaluation.agieval import TASKS
from paper.toy import CLASSES

PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "paper/README.md")}
STARTS = ("python ", ".venv/bin/python ", "torchrun ", "make", "pytest ")
ELSEWHERE = {  # not run here, and why
    "make demo": "test_train.py runs its commands in full (long)",
    "make test": "this",
    "make test_long": "this",
    "make test PYTHON=python3 VENV=": "this",
    "make gpu": "a GPU",
    "python -m kernels.bench": "a GPU",
    "python -m kernels.bench rms_norm --T 16384 --D 5120": "a GPU",
    "make paper": "`python -m paper`, here",
    "make paper_base": "`python -m paper.base`, here",
    "python -m kernels.compile": "4 minutes; test_triton.py compiles",
    "python -m kernels.bench --cpu": "a minute; test_kernels.py has its parts",
    "python -m paper.step": "test_survival.py runs it with --conversations 12 --rounds 1",
    "python tests/faults.py": "7 minutes; test_survival.py (long)",
}
LESS = {  # what makes a long command short: flags that replace its own
    "train.py --data": {"--steps": 2, "--batch_tokens": 8192},
    "-m paper.packing": {"--conversations": 2000},
    "agieval": {"--max_new": 2},
    "answers": {"--max_new": 4},
    "-m paper": {"--steps": 2, "--seeds": 1},
}


def commands(text):
    """Every command of a page: whole lines of code blocks, without what is explained behind them, and `..` in the text."""
    found = []
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith(STARTS):
            found.append(re.split(r" {3,}(?=[^-\s])", line)[0].strip())
    found += [
        span
        for span in re.findall(
            r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        )
        if span.startswith(STARTS)
    ]
    typed = dict.fromkeys(re.sub(r" {2,}", " ", c).replace(".venv/bin/", "") for c in found)
    # a flag of torchrun's may be named alone
    return [c for c in typed if not c.startswith("torchrun") or ".py" in c]


@pytest.fixture(scope="module")
def desk(toy, toy_run, tmp_path_factory):
    """A folder with every file that the READMEs' commands name, small."""
    desk = tmp_path_factory.mktemp("desk")
    rows = (toy / "train.jsonl").read_text().splitlines()[:300]
    write = lambda name, rows: (desk / name).write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    for name in ("chats.jsonl", "mixed_quality.jsonl", "YOUR.jsonl"):
        (desk / name).write_text("\n".join(rows) + "\n")
    for name in ("more.json", "sharegpt_format.json"):
        (desk / name).write_text("[" + ",\n".join(rows[:50]) + "]")
    shutil.copy(toy / "tokenizer.model", desk)
    shutil.copytree(toy_run / "hf", desk / "llama-2-13b-hf")
    (desk / "agieval").mkdir()
    meta = prepare(
        PrepareConfig(
            (str(desk / "chats.jsonl"),),
            str(desk / "tokenizer.model"),
            str(desk / "real2k.safetensors"),
            CLASSES,
            max_len=128,
        )
    )
    assert meta["expert"] == "GPT4"
    shutil.copy(desk / "real2k.safetensors", desk / "real.safetensors")
    for task in TASKS:
        write(
            f"agieval/{task}.jsonl",
            [{"passage": None, "question": "a?", "options": ["(A)a", "(B)b"], "label": "A"}],
        )
    (desk / "instructions.json").write_text(
        json.dumps([{"dataset": "koala", "instruction": "copy a b"}])
    )
    write(
        "question.jsonl",
        [{"question_id": 81, "category": "writing", "turns": ["copy a b", "sort b a"]}],
    )
    turns = [{"index": 0, "turns": ["a b", "a b"]}]
    for name in ("gpt-3.5-turbo", "gpt-4"):
        write(
            f"{name}.jsonl",
            [
                {
                    "question_id": 81,
                    "answer_id": "x",
                    "model_id": name,
                    "choices": turns,
                    "tstamp": 0.0,
                }
            ],
        )
    preference = {
        "instruction": "i",
        "generator_1": "text_davinci_003",
        "generator_2": "openchat",
        "preference": 2,
        "annotator": "alpaca_eval_gpt",
    }
    (desk / "annotations.json").write_text(json.dumps([preference]))
    return desk


def shorter(command):
    """The words of a command, the long ones with few steps."""
    words = shlex.split(command)
    for sign, flags in LESS.items():
        if (
            sign in command
            and "--dry_run" not in command
            and not (sign == "-m paper" and re.search(r"paper\.(packing|example|toy)", command))
        ):
            for flag, value in flags.items():
                if flag in words:
                    del words[words.index(flag) : words.index(flag) + 2]
                words += [flag, str(value)]
    return words


def run_here(words, desk):
    """A python or torchrun command in this process, as its script or module would run; torchrun of 2 ranks as itself."""
    if words[0] == "torchrun" and "--nproc_per_node=2" in words:
        here = [str(ROOT / word) if word == "train.py" else word for word in words[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *here],
            cwd=desk,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return
    if words[0] == "torchrun":  # GPU nodes: the same script, its flags, one process
        words = [
            "python",
            *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :],
        ]
    module, argv = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    before = sys.argv
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False) if words[
            1
        ] == "-m" else runpy.run_path(str(ROOT / module), run_name="__main__")
    finally:
        sys.argv = before


# two minutes, even with 2 steps a run
MANY_RUNS = [
    f"python -m paper{name}" for name in ("", ".base", ".fig6", ".fig7", ".alpha", ".classes")
]


@pytest.mark.parametrize("many_runs", (False, pytest.param(True, marks=pytest.mark.long)))
def test_every_command_runs(desk, monkeypatch, capsys, many_runs):
    monkeypatch.chdir(desk)
    monkeypatch.setattr("builtins.input", lambda *_: "")  # chat ends at an empty line
    todo = [c for text in PAGES.values() for c in commands(text)]
    assert len(todo) > 40
    for command in dict.fromkeys(todo):
        if command.startswith("pytest "):  # of make test_long
            file, name = re.search(r"(tests/\w+\.py).* -k (\w+)", command).groups()
            assert re.search(rf"def test_\w*{name}", (ROOT / file).read_text()), command
            continue
        if command in ELSEWHERE or (command in MANY_RUNS) != many_runs:
            continue
        if "batch_output.jsonl" in command:  # what a batch endpoint would send back
            asked = [
                json.loads(line) for line in (desk / "requests.jsonl").read_text().splitlines()
            ]
            reply = lambda row: {
                "custom_id": row["custom_id"],
                "error": None,
                "response": {
                    "status_code": 200,
                    "body": {"choices": [{"message": {"content": "[[A]]"}}]},
                },
            }
            (desk / "batch_output.jsonl").write_text(
                "".join(json.dumps(reply(row)) + "\n" for row in asked)
            )
        assert not any(word in command for word in (" .. ", "..`", " FILE", " DIR")), (
            f"not a command that can be typed: {command}"
        )
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                run_here(shorter(command), desk)
            except SystemExit as stop:
                assert stop.code in (None, 0), f"`{command}`: {stop.code}"


def test_equations_are_cited_where_the_table_puts_them():
    rows = [
        line
        for text in PAGES.values()
        for line in text.splitlines()
        if re.match(r"\| Eq\. \d", line)
    ]
    checked = 0
    for row in rows:
        numbers = re.findall(r"Eq\. \d+", row.split("|")[1])
        for name, file in re.findall(r"`(\w+)`[^`|]*? in `([\w/]+\.py)`", row):
            source = (ROOT / file).read_text()
            assert re.search(rf"^(def|class) {name}\b|^{name} =", source, re.M), (
                f"{name} is not in {file}"
            )
            assert all(re.search(rf"{n}\b", source) for n in numbers), (
                f"{file} does not cite {numbers}"
            )
            checked += 1
    assert checked >= 8
