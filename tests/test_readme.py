"""What the pages say: every CPU command runs as printed, equations are where the tables put them,
tables are the results' own, and the README can be read to its end."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pages
import pytest
from conftest import ROOT

from data import PrepareConfig, prepare
from evaluation.agieval import TASKS
from paper.toy import CLASSES

DOCS = sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))
# paper/README.md keeps its own form: wide tables, long paragraphs
READABLE = ("README.md", "CONTRIBUTING.md", *DOCS)
PAGES = {page: (ROOT / page).read_text() for page in (*READABLE, "paper/README.md")}

STARTS = ("python ", ".venv/bin/python ", "torchrun ", "make ", "pytest ")
# not run here, and why
ELSEWHERE = {
    "make demo": "test_train.py runs its commands in full (long)",
    "make test": "this",
    "make test_long": "this",
    "make lint": "test_style.py, and ruff",
    "make test PYTHON=python3 VENV=": "this",
    "make gpu": "a GPU",
    "make gpu VENV= PYTHON=python3 OUT=results": "a GPU",
    "make paper": "`python -m paper`, here",
    "make paper_details": "`python -m paper.details` and `python -m paper.claims`, here",
    "make real": "an hour; test_real.py runs it with 2 steps on a small base",
    "make real DATA=mixed_quality.jsonl": "as make real",
    'make real DATA="gpt4.json text_davinci_001.json text_davinci_003.json"': "as make real",
    "python -m paper.real mixed_quality.jsonl": "as make real",
    "python -m paper.real mixed_quality.jsonl --weight 1.0 --batch_tokens 768 --max_len 192": (
        "as make real"
    ),
    "python paper/atomic.py": "two minutes; test_atomic.py (long)",
    "python -m kernels.bench": "a GPU",
    "python -m kernels.bench rms_norm --T 16384 --D 5120": "a GPU",
    "python -m kernels.compile": "4 minutes; test_triton.py compiles",
    "python -m kernels.bench --cpu": "a minute; test_triton.py has it at a small size",
    "python -m paper.step": "test_survival.py runs it with --conversations 12 --rounds 1",
    "python tests/faults.py": "7 minutes; test_survival.py (long)",
    "python tests/same.py BEFORE AFTER": "two checkouts",
    "python tests/pages.py": "it writes into the pages",
    "python tests/fuzz.py --seed 1 --number 1000": "test_fuzz.py",
    "python tests/fuzz.py --seed 1 --first 17 --number 1 rows": "test_fuzz.py",
}
# what makes a long command short: flags that replace its own
LESS = {
    "train.py --data": {"--steps": 2, "--batch_tokens": 8192},
    "-m paper.packing": {"--conversations": 2000},
    "-m paper.cancel": {"--conversations": 2000},
    "agieval": {"--max_new": 2},
    "answers": {"--max_new": 4},
    "-m paper": {"--steps": 2, "--seeds": 1},
}
# minutes together, even with 2 steps a run; paper.fig3, which trains nothing, is not among them
MANY_RUNS = [
    "python -m paper",
    "python -m paper.alpha",
    "python -m paper.claims",
    "python -m paper.classes",
    "python -m paper.details",
    "python -m paper.fig4",
    "python -m paper.fig5",
    "python -m paper.fig6",
    "python -m paper.fig7",
    "python -m paper.habits",
    "python -m paper.optimum",
    "python -m paper.table2",
]


# ---- the commands of a page


def commands(text):
    """Every command of a page: whole lines of code blocks, without what is explained behind them,
    and what stands in backticks in the text."""
    found = []
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith(STARTS):
            command, *_ = re.split(r" {3,}(?=[^-\s])", line)
            found.append(command.strip())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    # a command in the text may be broken over two lines
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        command = " ".join(span.split())
        if command.startswith(STARTS):
            found.append(command)

    typed = {}
    for command in found:
        command = re.sub(r" {2,}", " ", command).replace(".venv/bin/", "")
        # a flag of torchrun's may be named alone
        if ".py" in command or not command.startswith("torchrun"):
            typed[command] = None
    return list(typed)


def needs_a_gpu(command):
    """The command of a results file, quoted below its table."""
    return "--out results" in command


def shorter(command):
    """The words of a command, the long ones with few steps."""
    words = shlex.split(command)
    if "--dry_run" in command:
        return words
    for sign, flags in LESS.items():
        quick = sign == "-m paper" and re.search(r"paper\.(packing|cancel|example|toy)", command)
        if sign not in command or quick:
            continue
        for flag, value in flags.items():
            if flag in words:
                at = words.index(flag)
                del words[at : at + 2]
            words += [flag, str(value)]
    return words


# ---- a folder with every file that the commands name, small


@pytest.fixture(scope="module")
def desk(toy, toy_run, tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    rows = (toy / "train.jsonl").read_text().splitlines()[:300]
    for name in ("chats.jsonl", "mixed_quality.jsonl", "YOUR.jsonl"):
        (desk / name).write_text("\n".join(rows) + "\n")
    for name in ("more.json", "sharegpt_format.json"):
        (desk / name).write_text("[" + ",\n".join(rows[:50]) + "]")
    shutil.copy(toy / "tokenizer.model", desk)
    shutil.copytree(toy_run / "hf", desk / "llama-2-13b-hf")
    prepare_small(desk)
    lay_out_benchmarks(desk)
    return desk


def prepare_small(desk):
    config = PrepareConfig(
        files=(str(desk / "chats.jsonl"),),
        tokenizer=str(desk / "tokenizer.model"),
        out=str(desk / "real2k.safetensors"),
        classes=CLASSES,
        max_len=128,
    )
    meta = prepare(config)
    assert meta["expert"] == "GPT4"
    shutil.copy(desk / "real2k.safetensors", desk / "real.safetensors")


def lay_out_benchmarks(desk):
    (desk / "agieval").mkdir()
    item = {"passage": None, "question": "a?", "options": ["(A)a", "(B)b"], "label": "A"}
    for task in TASKS:
        write_rows(desk / f"agieval/{task}.jsonl", [item])
    alpaca = [{"dataset": "koala", "instruction": "copy a b"}]
    (desk / "instructions.json").write_text(json.dumps(alpaca))
    question = {"question_id": 81, "category": "writing", "turns": ["copy a b", "sort b a"]}
    write_rows(desk / "question.jsonl", [question])
    for name in ("gpt-3.5-turbo", "gpt-4"):
        answer = {"question_id": 81, "answer_id": "x", "model_id": name, "tstamp": 0.0}
        answer["choices"] = [{"index": 0, "turns": ["a b", "a b"]}]
        write_rows(desk / f"{name}.jsonl", [answer])
    preference = {
        "instruction": "i",
        "generator_1": "text_davinci_003",
        "generator_2": "openchat",
        "preference": 2,
        "annotator": "alpaca_eval_gpt",
    }
    (desk / "annotations.json").write_text(json.dumps([preference]))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_requests(desk):
    """What a batch endpoint would send back."""
    replies = []
    for line in (desk / "requests.jsonl").read_text().splitlines():
        body = {"choices": [{"message": {"content": "[[A]]"}}]}
        reply = {"custom_id": json.loads(line)["custom_id"], "error": None}
        reply["response"] = {"status_code": 200, "body": body}
        replies.append(reply)
    write_rows(desk / "batch_output.jsonl", replies)


def run_here(words, desk):
    """A python or torchrun command in this process, as its script or module would run; torchrun of
    2 ranks as itself."""
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

    # GPU nodes: the same script, its flags, one process
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    is_module = words[1] == "-m"
    name, *argv = words[2:] if is_module else words[1:]
    before = sys.argv
    sys.argv = [name, *argv]
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        sys.argv = before


@pytest.mark.parametrize("many_runs", (False, pytest.param(True, marks=pytest.mark.long)))
def test_every_command_runs(desk, monkeypatch, capsys, many_runs):
    monkeypatch.chdir(desk)
    # chat ends at an empty line
    monkeypatch.setattr("builtins.input", lambda *_: "")
    todo = {}
    for text in PAGES.values():
        todo.update(dict.fromkeys(commands(text)))
    assert len(todo) > 40
    for command in todo:
        # of make test_long
        if command.startswith("pytest "):
            file, name = re.search(r"(tests/\w+\.py)(?:.* -k (\w+))?", command).groups()
            assert re.search(rf"def test_\w*{name or ''}", (ROOT / file).read_text()), command
            continue
        if command in ELSEWHERE or needs_a_gpu(command):
            continue
        if (command in MANY_RUNS) != many_runs:
            continue
        if "batch_output.jsonl" in command:
            answer_requests(desk)
        placeholders = (" .. ", "..`", " FILE", " DIR")
        assert not any(word in command for word in placeholders), f"cannot be typed: {command}"
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                run_here(shorter(command), desk)
            except SystemExit as stop:
                assert stop.code in (None, 0), f"`{command}`: {stop.code}"


# ---- what the tables say


def test_equations_are_cited_where_the_table_puts_them():
    rows = []
    for text in PAGES.values():
        rows += [line for line in text.splitlines() if re.match(r"\| Eq\. \d", line)]
    checked = 0
    for row in rows:
        numbers = re.findall(r"Eq\. \d+", row.split("|")[1])
        for name, file in re.findall(r"`(\w+)`[^`|]*? in `([\w/]+\.py)`", row):
            source = (ROOT / file).read_text()
            defined = re.search(rf"^(def|class) {name}\b|^{name} =", source, re.M)
            assert defined, f"{name} is not in {file}"
            cited = all(re.search(rf"{number}\b", source) for number in numbers)
            assert cited, f"{file} does not cite {numbers}"
            checked += 1
    assert checked >= 8


def test_tables_are_those_of_the_results():
    for page, tables in pages.PAGES.items():
        for table in tables:
            shown = pages.region(table.__name__).search(PAGES[page])
            assert shown, f"{page} has no table {table.__name__}"
            assert table() in shown[0], f"{page}: {table.__name__}; run python tests/pages.py"


def test_the_promise_is_the_demos_report():
    report = json.loads((ROOT / "results" / "demo.json").read_text())
    for name in ("expert_prompt", "other_prompt"):
        assert f"{report[name]:.0%}" in PAGES["README.md"]
        assert f"{report[name]:.3f}" in PAGES["README.md"]


def test_files_of_the_map_are_there():
    """README's and CONTRIBUTING's tables name files and folders that exist."""
    checked = 0
    for page in ("README.md", "CONTRIBUTING.md"):
        for line in PAGES[page].splitlines():
            if line.startswith("| `"):
                for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", line.split("|")[1]):
                    assert (ROOT / name).exists(), f"{page} names {name}"
                    checked += 1
    assert checked >= 20


# ---- a page that is read to its end


def test_the_readme_is_short():
    text = PAGES["README.md"]
    assert len(text.split()) <= 2500
    assert len(text.splitlines()) <= 220


@pytest.mark.parametrize("page", READABLE)
def test_paragraphs_and_tables_are_narrow(page):
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-\d]+[.]? )", prose):
        lines = paragraph.strip().splitlines()
        if lines and lines[0].startswith("|"):
            columns = lines[0].count("|") - 1
            assert columns <= 6, f"{page}: a table of {columns} columns: {lines[0]}"
        elif not paragraph.lstrip().startswith(("#", "<!--")):
            words = len(paragraph.split())
            assert words <= 80, f"{page}: a paragraph of {words} words: {paragraph[:60]}"
