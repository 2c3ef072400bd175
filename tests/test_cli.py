"""What a user can get wrong: one line with place and remedy, a non-zero exit, no half a file."""

import json
import os
import subprocess
import sys
import tracemalloc

import pages
import pytest
from conftest import ROOT, call, refused

import data
import evaluate
import paper.__main__
import paper.toy
import sample
import train
from support.cli import flags_of, one_line, run

ROW = {
    "model": "m",
    "conversations": [{"from": "human", "value": "copy a"}, {"from": "gpt", "value": "a"}],
}


# ---- help


def helped(monkeypatch, capsys, main, *words):
    """What a program prints when it is asked for help, and nothing else happens."""
    monkeypatch.setattr("sys.argv", ["x.py", *words])
    # it returns: the program ends with 0
    run(main)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_every_field_has_a_comment():
    for title, config_class, _ in pages.ENTRY_POINTS:
        for name, _, lines in flags_of(config_class):
            assert lines, f"{title}: --{name} has no comment line directly above its field"


MAINS = {
    "train": train.main,
    "data": data.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
    "-m paper,": paper.__main__.main,
    "-m paper.toy": paper.toy.main,
}


def test_help_says_every_flag_with_its_default_and_comment(monkeypatch, capsys):
    shown = 0
    for title, config_class, positional in pages.ENTRY_POINTS:
        name = next((name for name in MAINS if title.split(".py")[0].startswith(name)), None)
        if name is None:
            continue
        words = title.split(".py")[1].split() if ".py" in title else []
        for asked in ("--help", "-h"):
            out = helped(monkeypatch, capsys, MAINS[name], *words, asked)
            for flag, default, lines in flags_of(config_class):
                start = f"{flag.upper()}.." if flag == positional else f"--{flag}"
                text = "".join(f"    {line}\n" for line in lines)
                text += f"    default: {default}\n" if default else ""
                assert f"\n{start}\n{text}" in out + "\n"
                shown += 1
    assert shown > 200


def test_help_of_a_program_with_commands_names_them(monkeypatch, capsys):
    for main, commands in ((data.main, ("prepare", "show", "stats")), (evaluate.main, ("judge",))):
        out = helped(monkeypatch, capsys, main, "-h")
        for command in commands:
            assert f".py {command} " in out
    # as a user calls it; and a value that looks like a flag is a value
    out, _ = call("sample.py", "--help")
    assert "\n--top_p\n" in out
    assert "give one model directory" in refused(sample.main, "--prompt", "-h")


# ---- what is no text


def test_arguments_that_are_not_utf8_are_refused():
    line = refused(sample.main, "x", "--prompt", os.fsdecode(b"caf\xe9"))
    assert "argument 3, 'caf\\udce9', is not UTF-8 from character 3 on" in line


def test_an_error_is_one_line_whatever_stands_in_it():
    assert one_line(ValueError("a\nb\u2028c")) == "a\\nb\\nc"
    line = one_line(ValueError(f"x.json:3: {'y' * 10**6}; mend the line"))
    assert len(line) < 1100
    assert line.startswith("x.json:3: yyy")
    assert line.endswith("; mend the line")


def refused_prepare(toy, tmp_path, line, *words):
    """How `data.py prepare` refuses a file whose second line is this one, or these words."""
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(ROW) + "\n" + line)
    tokenizer = "--tokenizer", toy / "tokenizer.model"
    out = "--out", tmp_path / "x.safetensors"
    words = words or ("--classes", "*=GPT4:1")
    err = refused(data.main, "prepare", source, *tokenizer, *out, *words)
    assert {p.name for p in tmp_path.iterdir()} == {"source.jsonl"}
    return err


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"conversations": [', "source.jsonl:2: not JSON"),
        (
            '{"messages": [{"role": "tool", "content": ""}]}',
            "source.jsonl:2: role 'tool' is not one of",
        ),
        ('{"id": 3}', "source.jsonl:2: no messages"),
    ],
)
def test_prepare_names_the_line(toy, tmp_path, line, message):
    assert message in refused_prepare(toy, tmp_path, line)


def test_prepare_names_what_else_is_wrong(toy, tmp_path):
    def fail(*words):
        return refused_prepare(toy, tmp_path, json.dumps(ROW), *words)

    known = "--classes", "*=A:1"
    assert "label 'm' matches no class" in fail("--classes", "other=GPT4:1")
    assert "--tokeniser is no flag; did you mean --tokenizer?" in fail("--tokeniser", "x")
    assert "--max_len 'ten' is not a whole number" in fail("--max_len=ten")
    assert "nowhere.model: no such tokenizer" in fail("--tokenizer", "nowhere.model")
    assert "--template 'x' is not one of" in fail("--template", "x", *known)
    out = "--out", tmp_path / "source.jsonl"
    assert "does not end in .safetensors" in fail(*out, *known)
    assert "no conversation has a token to train on" in fail("--classes", "*=A:0")


def test_train_names_what_is_wrong(toy, toy_run, tmp_path):
    def fail(*words, data=toy / "train.safetensors"):
        required = "--data", data, "--model", "toy", "--out", tmp_path / "run"
        return refused(train.main, *required, *words)

    _, err = call("train.py", ok=False)
    assert "python -m paper.toy --out out/demo" in err
    assert "python train.py --data" in err
    assert "--stpes is no flag; did you mean --steps?" in fail("--stpes", 3)
    assert "no such prepared file" in fail(data=tmp_path / "none")
    assert "not a whole prepared file" in fail(data=toy / "train.jsonl")
    assert "neither a directory nor one of toy, small" in fail("--model", "llama-3")
    assert "max_len 128, more than --micro_tokens 64" in fail("--micro_tokens", 64)
    assert "--warmup 3.0 is not from 0" in fail("--warmup", 3)
    assert "--lr 0.0 is not from 1e-30 to below 1e30" in fail("--lr", 0)
    assert "--seed -1 is not" in fail("--seed", -1)
    assert not (tmp_path / "run").exists()


def test_train_names_what_is_wrong_with_a_base(toy, toy_run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in (toy_run / "hf").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "manifest.json").unlink()
    config = json.loads((base / "config.json").read_text())

    def fail(**changed):
        (base / "config.json").write_text(json.dumps(config | changed))
        data = "--data", toy / "train.safetensors"
        return refused(train.main, *data, "--model", base, "--out", tmp_path / "run")

    assert "vocab_size 90 is below the 96 tokens" in fail(vocab_size=90)
    message = "mlp.down_proj.weight is [96, 256], config.json says [96, 99]"
    assert message in fail(intermediate_size=99)
    (base / "tokenizer.model").write_bytes(b"other")
    assert "is not the tokenizer of" in fail(intermediate_size=99)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    data_words = "--data", toy / "train.safetensors"
    err = refused(train.main, *data_words, "--model", "toy", "--out", out)
    assert str(tmp_path / "file") in err

    tokenizer = "--tokenizer", toy / "tokenizer.model"
    words = *tokenizer, "--classes", "*=A:1", "--out", out / "x.safetensors"
    err = refused(data.main, "prepare", toy / "train.jsonl", *words)
    assert str(tmp_path / "file") in err


# No file grows beyond 200 kB.
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def limited(*words):
    """The error of a script that runs where the disk is full; it must be one line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIMITED, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode != 0, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_a_full_disk(toy, tmp_path):
    """Files end at 200 kB: the write fails as on a full disk, and nothing of it remains."""
    tokenizer = "--tokenizer", toy / "tokenizer.model"
    out = "--out", tmp_path / "x.safetensors"
    limited("data.py", "prepare", toy / "train.jsonl", *tokenizer, "--classes", "*=A:1", *out)
    assert list(tmp_path.iterdir()) == []

    run = tmp_path / "run"
    words = "--data", toy / "train.safetensors", "--model", "toy", "--steps", 1
    err = limited("train.py", *words, "--out", run)
    assert "step-1 could not be written" in err
    assert list((run / "checkpoints").iterdir()) == []


def test_sample_names_what_is_wrong(toy_run, tmp_path):
    hf = toy_run / "hf"

    def fail(*words):
        return refused(sample.main, *words)

    assert "give one model directory" in fail()
    assert "no config.json" in fail(tmp_path, "--condition", "GPT4")
    message = "--condition 'GPT5' is none of the classes trained with: GPT4, GPT3"
    assert message in fail(hf, "--condition", "GPT5")
    assert "--temperature is 0" in fail(hf, "--temperature", "nan")
    assert "--temperature is 0" in fail(hf, "--temperature", "1e-42")
    assert "--temperature is 0" in fail(hf, "--top_p", 0)
    assert "--seed is from 0" in fail(hf, "--seed", 10**20)
    assert "--input and --output go together" in fail(hf, "--input", "x")
    assert "one of the two" in fail(hf, "--prompt", "x", "--input", "x", "--output", tmp_path / "y")


def test_sample_names_the_row_that_is_wrong(toy_run, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def fail(output, *words):
        return refused(sample.main, toy_run / "hf", "--input", source, "--output", output, *words)

    source.write_text('{"prompt": "copy a"}\n{"prompt": 7}\n')
    assert "in.jsonl:2: a prompt is" in fail(out)
    source.write_text(json.dumps({"prompt": "a " * 200}))
    assert "nowhere" in fail(tmp_path / "nowhere" / "out.jsonl", "--truncate_left")
    assert "row 1: the prompt has" in fail(out)
    assert not out.exists()


def test_show_names_what_is_wrong(toy, tmp_path):
    def fail(*words):
        return refused(data.main, *words)

    prepared = toy / "train.safetensors"
    words = "show", toy / "train.jsonl", "--tokenizer", toy / "tokenizer.model"
    assert "--template 'x' is not one of" in fail(*words, "--template", "x")
    assert "no conversation has a token to train on" in fail(*words, "--classes", "*=A:0")
    assert "shown with --tokenizer PATH" in fail("show", toy / "train.jsonl")
    assert "--tokenizer" in fail("show")
    assert "nofile: show takes one prepared file" in fail("show", prepared, "nofile")
    assert "train.safetensors is prepared" in fail("show", prepared, "--template", "none")
    for flag in ("--micro_tokens", "--ranks", "--tokens_per_s"):
        assert f"{flag} 0" in fail("stats", prepared, flag, 0)
    # neither may take as much memory as it says
    assert "lower --batch_tokens" in fail("stats", prepared, "--batch_tokens", 2**31)
    tracemalloc.start()
    data.main(["stats", str(prepared), "--ranks", str(2**31)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**28


def test_stats(toy, tmp_path, capsys):
    flags = "--batch_tokens=6144 --micro_tokens=1536 --ranks=2 --tokens_per_s=1000".split()
    picture = tmp_path / "x.png"
    data.main(["stats", str(toy / "train.safetensors"), *flags, f"--png={picture}"])
    out = capsys.readouterr().out
    # By hand: 3,304 experts' tokens of weight 1 and 34,889 of 0.1 weigh 3,304 + 3,488.9; 6,792.9^2
    # / (3,304 + 348.89) = 12,632.
    assert "12,632 of 38,193 supervised tokens" in out
    assert " 48.6% " in out
    assert "(0.4864 in all)" in out
    assert "an epoch: 23 steps of 4 x 1,536 tokens, 97.2% full" in out
    assert "0.04 hours an epoch" in out
    assert "lr 6.11e-06 = 0.0003 * sqrt(1,661 supervised tokens a step / 4e6)" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_prints_tokens_by_weight(toy, capsys):
    data.main(["show", str(toy / "train.safetensors"), "--n", "1"])
    out = capsys.readouterr().out
    assert " GPT3 Assistant:[0.1| " in out
    assert "5,500" in out
    assert "expert: GPT4" in out
    assert "after ':' the model is to say ' e', weight 0.1" in out
    assert "after ' a' the model is to say '<|end_of_turn|>', weight 0.1" in out

    tokenizer = "--tokenizer", str(toy / "tokenizer.model")
    data.main(["show", str(toy / "train.jsonl"), *tokenizer, "--n=1"])
    out = capsys.readouterr().out
    assert "GPT4 Assistant:[1| " in out
    assert "lengths of 6,000 conversations" in out
