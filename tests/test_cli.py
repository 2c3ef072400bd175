"""What a user can get wrong at an entry point: one line with place and remedy, a non-zero exit, nothing half-written."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, call, refused

import data
import sample
import train

ROW = {
    "model": "m",
    "conversations": [{"from": "human", "value": "copy a"}, {"from": "gpt", "value": "a"}],
}


def prepare(toy, tmp_path, line, *words):
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(ROW) + "\n" + line)
    words = words or ("--classes", "*=GPT4:1")
    err = refused(
        data.main,
        "prepare",
        source,
        "--tokenizer",
        toy / "tokenizer.model",
        "--out",
        tmp_path / "x.safetensors",
        *words,
    )
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
    assert message in prepare(toy, tmp_path, line)


def test_prepare_names_what_else_is_wrong(toy, tmp_path):
    good = json.dumps(ROW)
    assert "label 'm' matches no class" in prepare(toy, tmp_path, good, "--classes", "other=GPT4:1")
    assert "--tokeniser is no flag; did you mean --tokenizer?" in prepare(
        toy, tmp_path, good, "--tokeniser", "x"
    )
    assert "--max_len 'ten' is not a whole number" in prepare(toy, tmp_path, good, "--max_len=ten")
    assert "nowhere.model: no such tokenizer" in prepare(
        toy, tmp_path, good, "--tokenizer", "nowhere.model"
    )
    assert "--template 'x' is not one of" in prepare(
        toy, tmp_path, good, "--template", "x", "--classes", "*=A:1"
    )
    assert "does not end in .safetensors" in prepare(
        toy, tmp_path, good, "--out", tmp_path / "source.jsonl", "--classes", "*=A:1"
    )
    assert "no conversation has a token to train on" in prepare(
        toy, tmp_path, good, "--classes", "*=A:0"
    )


def test_train_names_what_is_wrong(toy, toy_run, tmp_path):
    file, base = toy / "train.safetensors", tmp_path / "base"
    fail = lambda *words, data=file: refused(
        train.main, "--data", data, "--model", "toy", "--out", tmp_path / "run", *words
    )
    _, err = call("train.py", ok=False)
    assert "python -m paper.toy --out out/demo" in err and "python train.py --data" in err
    assert "--stpes is no flag; did you mean --steps?" in fail("--stpes", 3)
    assert "no such prepared file" in fail(data=tmp_path / "none")
    assert "not a whole prepared file" in fail(data=toy / "train.jsonl")
    assert "neither a directory nor one of toy, small" in fail("--model", "llama-3")
    assert "max_len 128, more than --micro_tokens 64" in fail("--micro_tokens", 64)
    for words, message in (
        (("--warmup", 3), "--warmup 3.0 is not from 0"),
        (("--lr", 0), "--lr 0.0 is not above 0"),
        (("--seed", -1), "--seed -1 is not"),
    ):
        assert message in fail(*words)
    base.mkdir()
    for file in (toy_run / "hf").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "manifest.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    assert "vocab_size 90 is below the 96 tokens" in fail("--model", base)
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 99}))
    assert "mlp.down_proj.weight is [96, 256], config.json says [96, 99]" in fail("--model", base)
    (base / "tokenizer.model").write_bytes(b"other")
    assert "is not the tokenizer of" in fail("--model", base)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    assert str(tmp_path / "file") in refused(
        train.main, "--data", toy / "train.safetensors", "--model", "toy", "--out", out
    )
    words = (
        "prepare",
        toy / "train.jsonl",
        "--tokenizer",
        toy / "tokenizer.model",
        "--classes",
        "*=A:1",
        "--out",
        out / "x.safetensors",
    )
    assert str(tmp_path / "file") in refused(data.main, *words)


LIMITED = (
    "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_a_full_disk(toy, tmp_path):
    """Files end at 200 kB: the write fails as on a full disk, with one line, and the old file or nothing remains."""

    def limited(*words):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=env,
        )

    target = tmp_path / "x.safetensors"
    done = limited(
        "data.py",
        "prepare",
        toy / "train.jsonl",
        "--tokenizer",
        toy / "tokenizer.model",
        "--classes",
        "*=A:1",
        "--out",
        target,
    )
    assert (
        done.returncode
        and len(done.stderr.strip().splitlines()) == 1
        and list(tmp_path.iterdir()) == []
    ), done.stderr
    run = tmp_path / "run"
    done = limited(
        "train.py",
        "--data",
        toy / "train.safetensors",
        "--model",
        "toy",
        "--out",
        run,
        "--steps",
        1,
    )
    assert (
        done.returncode
        and len(done.stderr.strip().splitlines()) == 1
        and "step-1 could not be written" in done.stderr
    ), done.stderr
    assert list((run / "checkpoints").iterdir()) == []


def test_sample_names_what_is_wrong(toy_run, tmp_path):
    fail = lambda *words: refused(sample.main, *words)
    assert "give one model directory" in fail()
    assert "no config.json" in fail(tmp_path, "--condition", "GPT4")
    assert "--condition 'GPT5' is none of the classes trained with: GPT4, GPT3" in fail(
        toy_run / "hf", "--condition", "GPT5"
    )
    for words in (
        ("--temperature", "nan"),
        ("--temperature", "1e-42"),
        ("--top_p", 0),
        ("--seed", 10**20),
    ):
        assert (
            "--temperature is 0" in (err := fail(toy_run / "hf", *words))
            or "--seed is from 0" in err
        )
    assert "--input and --output go together" in fail(toy_run / "hf", "--input", "x")
    (tmp_path / "in.jsonl").write_text('{"prompt": "copy a"}\n{"prompt": 7}\n')
    assert "in.jsonl:2: no messages" in fail(
        toy_run / "hf", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    )
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a " * 200}))
    assert "nowhere" in fail(
        toy_run / "hf",
        "--input",
        tmp_path / "in.jsonl",
        "--output",
        tmp_path / "nowhere" / "out.jsonl",
        "--truncate_left",
    )
    assert "row 1: the prompt has" in fail(
        toy_run / "hf", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_show_names_what_is_wrong(toy, tmp_path):
    words = "show", toy / "train.jsonl", "--tokenizer", toy / "tokenizer.model"
    assert "--template 'x' is not one of" in refused(data.main, *words, "--template", "x")
    assert "no conversation has a token to train on" in refused(
        data.main, *words, "--classes", "*=A:0"
    )
    assert "--tokenizer tokenizer.model" in refused(data.main, "show", toy / "train.jsonl")
    assert "--tokenizer" in refused(data.main, "show")
    assert "nofile: show takes one prepared file" in refused(
        data.main, "show", toy / "train.safetensors", "nofile"
    )
    for flag in ("--micro_tokens", "--ranks", "--tokens_per_s"):
        assert f"{flag} 0" in refused(data.main, "stats", toy / "train.safetensors", flag, 0)


def test_stats(toy, tmp_path, capsys):
    data.main(
        [
            "stats",
            str(toy / "train.safetensors"),
            "--batch_tokens=6144",
            "--micro_tokens=1536",
            "--ranks=2",
            "--tokens_per_s=1000",
            f"--png={tmp_path / 'x.png'}",
        ]
    )
    out = capsys.readouterr().out
    # By hand: 3,304 experts' tokens of weight 1 and 34,889 of 0.1 weigh 3,304 + 3,488.9; 6,792.9^2
    # / (3,304 + 348.89) = 12,632.
    assert (
        "12,632 of 38,193 supervised tokens" in out
        and " 48.6% " in out
        and "(0.4864 in all)" in out
    )
    assert (
        "an epoch: 23 steps of 4 x 1,536 tokens, 97.2% full" in out and "0.04 hours an epoch" in out
    )
    assert "lr 6.11e-06 = 0.0003 * sqrt(1,661 supervised tokens a step / 4e6)" in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_show_prints_tokens_by_weight(toy, capsys):
    data.main(["show", str(toy / "train.safetensors"), "--n", "1"])
    out = capsys.readouterr().out
    assert " GPT3 Assistant:[0.1| " in out and "5,500" in out and "expert: GPT4" in out
    assert (
        "after ':' the model is to say ' e', weight 0.1" in out
        and "after ' a' the model is to say '<|end_of_turn|>', weight 0.1" in out
    )
    data.main(
        ["show", str(toy / "train.jsonl"), "--tokenizer", str(toy / "tokenizer.model"), "--n=1"]
    )
    out = capsys.readouterr().out
    assert "GPT4 Assistant:[1| " in out and "lengths of 6,000 conversations" in out
