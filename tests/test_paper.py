"""The paper in miniature: the task and its score, exact optima, the statistics, runs that are made once, the committed results."""

import dataclasses
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, refused

import paper.fig4 as fig4
import paper.fig5 as fig5
import paper.optimum as optimum
import paper.runs as runs
from conversations import Message
from data import Prepared
from paper.runs import PaperConfig, converse, interval, perform, score
from paper.toy import Task, answer, full_questions, make_task, solve
from sample import SampleConfig, Speaker

COMMANDS = (
    "table2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "alpha",
    "optimum",
    "classes",
    "seven",
    "base",
)


# ---- the task


def test_the_task():
    sources, heldout = make_task(Task())
    expert, other = sources["GPT-4"], sources["GPT-3.5"]
    assert (len(expert), len(other), len(heldout)) == (300, 3300, 400)
    asked = {turns[0][0] for source in sources.values() for turns in source}
    assert asked.isdisjoint(words[0] for words in heldout), "a held-out prompt is trained on"
    for turns in expert + other:
        letters = None
        for words, reply, right in turns:
            skill, *given = words.removeprefix("then ").split()
            assert right == (reply == answer(" ".join([skill, *(given or letters)])))
            letters = reply.split()
    rights = lambda source: [right for turns in source for *_, right in turns]
    # errors are right by luck, too
    assert all(rights(expert)) and sum(rights(other)) / len(rights(other)) == pytest.approx(
        0.44, abs=0.03
    )
    shifts = lambda source: (
        sum("shift" in words for turns in source for words, *_ in turns) / len(rights(source))
    )
    assert 0 < shifts(expert) < 0.03 and shifts(other) == pytest.approx(1 / 3, abs=0.03)
    assert make_task(Task())[0] == sources and make_task(Task(seed=1))[1] != heldout
    fewer = make_task(Task(keep=(1.0, 0.6)))[0]
    assert fewer["GPT-4"] == expert and fewer["GPT-3.5"] == other[:1980]


class Stub:
    """A speaker that answers with a function of the conversation."""

    def __init__(self, say):
        self.say = say

    def ids(self, messages):
        return messages

    def answer_all(self, chats, how):
        return [(self.say(chat), "stop") for chat in chats]

    def text(self, ids):
        return ids


def truth(chat):
    letters = chat[0].text.split()[1:]
    for message in chat[::2]:
        letters = answer(
            " ".join([message.text.removeprefix("then ").split()[0], *letters])
        ).split()
    return " ".join(letters)


def test_the_score():
    heldout = [
        ["copy a b", "then reverse"],
        ["reverse c d", "then copy", "then shift"],
        ["shift h a"],
    ]
    assert [solve(asked) for asked in heldout] == [["a b", "b a"], ["d c", "d c", "e d"], ["a b"]]
    assert full_questions(heldout[1], solve(heldout[1])) == ["reverse c d", "copy d c", "shift d c"]
    perfect = {
        "all": 1.0,
        "by_turn": [1.0] * 3,
        "by_skill": {"copy": 1.0, "reverse": 1.0, "shift": 1.0},
        "unseen": 1.0,
    }
    assert score(Stub(truth), heldout)["greedy"] == perfect
    assert score(Stub(lambda chat: "e"), heldout)["sampled"]["all"] == 0
    # After its error a conversation does not count, but its later turns are asked with the right
    # answer in place of the wrong one.
    second = Stub(lambda chat: truth(chat) if len(chat) != 1 else "x")
    assert converse(second, heldout, 0.0) == [[False, True], [False, True, True], [False]]
    assert score(second, heldout)["sampled"] == {
        "all": 0.0,
        "by_turn": [0.0, 1.0, 1.0],
        "by_skill": {"copy": 0.5, "reverse": 0.5, "shift": 0.5},
        "unseen": 0.5,
    }
    no_shift = Stub(lambda chat: "x" if "shift" in chat[-1].text else truth(chat))
    assert score(no_shift, heldout, {"copy a b", "shift h a"})["sampled"] == {
        "all": 4 / 6,
        "by_turn": [2 / 3, 1.0, 0.0],
        "by_skill": {"copy": 1.0, "reverse": 1.0, "shift": 0.0},
        "unseen": 3 / 4,
    }


# ---- the optimum, statistics, representations, guidance


def test_tabular_fits_reach_the_optimum_and_shared_ones_do_not():
    pi_CXY, _ = optimum.policies()
    by_class, z_CX1 = optimum.optimum(pi_CXY, optimum.rewards("class"))
    # a reward that is constant in a class changes nothing
    torch.testing.assert_close(by_class, pi_CXY)
    torch.testing.assert_close(z_CX1[:, 0, 0], torch.tensor([10.0, 1.0]))  # exp(r_c / beta)
    worst = lambda star, *how: max(optimum.divergence(star, optimum.fit(*how)))
    for weights in ("exact", "as published", "unweighted"):
        assert worst(pi_CXY, "class", weights, False) < 1e-4
    by_answer = optimum.optimum(pi_CXY, optimum.rewards("answer"))[0]
    assert (
        worst(by_answer, "answer", "exact", False) < 1e-3
        and worst(by_answer, "answer", "as published", False) < 1e-3
    )
    assert (
        worst(by_answer, "answer", "unweighted", False) > 0.1
        and worst(pi_CXY, "answer", "unweighted", False) < 1e-4
    )
    published, plain, exact = (
        optimum.divergence(pi_CXY, optimum.fit("class", w, True))
        for w in ("as published", "unweighted", "exact")
    )
    assert (
        exact == pytest.approx(plain, abs=1e-4)
        and published[0] < plain[0] / 2
        and published[1] > 2 * plain[1]
    )
    # Eq. 4's maximum: what a policy lacks is beta KL(pi, pi*), so the published weight, better for
    # the expert, can be the worse solution.
    lacks = {
        w: optimum.lacks(pi_CXY, optimum.fit("class", w, True)) for w in ("as published", "exact")
    }
    objective = lambda log_CXY: (
        (
            optimum.policies()[1][:, :, None]
            * log_CXY.exp()
            * (optimum.rewards("class") - optimum.BETA * (log_CXY - pi_CXY.log()))
        )
        .sum()
        .item()
    )
    best, reached = objective(pi_CXY.log()), objective(optimum.fit("class", "as published", True))
    assert (
        best - reached == pytest.approx(lacks["as published"], abs=1e-5)
        and lacks["as published"] > 1.5 * lacks["exact"] > 0
    )


def test_intervals_are_student_s():
    assert interval([1, 2, 3]) == (2, pytest.approx(4.303 / math.sqrt(3)))
    assert (
        interval([0.5]) == (0.5, None)
        and runs.cell([1, 2, 3], 1) == "2.0 +- 2.5"
        and runs.cell([0.25]) == "0.250"
    )


def test_probe_and_silhouette():
    generator = torch.Generator().manual_seed(0)
    noise_ND, expert_N = (
        torch.randn(400, 8, generator=generator, dtype=torch.double),
        torch.arange(400) % 2 == 0,
    )
    apart_ND = noise_ND + 20 * expert_N[:, None]
    assert (
        fig4.probe(apart_ND, expert_N, 0) == 1 and 0.35 < fig4.probe(noise_ND, expert_N, 0) < 0.65
    )
    assert (
        fig4.silhouette(fig4.plane(apart_ND), expert_N) > 0.8
        and abs(fig4.silhouette(noise_ND, expert_N)) < 0.05
    )
    assert fig4.silhouette(
        torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([True, True, False, False])
    ) == pytest.approx((9.5 / 10.5 + 8.5 / 9.5) / 2)


class Few(Prepared):
    """The first n conversations of a prepared file."""

    def __init__(self, path, n):
        super().__init__(path)
        self.lengths, self.class_ids = self.lengths[:n], self.class_ids[:n]


def test_pooling_is_the_mean_of_each_conversation(toy, toy_run):
    data, model = Few(toy / "train.safetensors", 130), Speaker(toy_run / "hf").model
    states_ND, expert_N = fig4.pooled(model, data, False)
    answers_ND, _ = fig4.pooled(model, data, True)
    for i in (0, 99, 100, 129):
        batch = data.batch([i])
        with torch.no_grad():
            hidden_TD = model(batch.tokens_T, batch.positions_T, batch.cu_seqlens).double()
        weights = torch.from_numpy(data.conversation(i)[1])
        torch.testing.assert_close(states_ND[i], hidden_TD.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            answers_ND[i], hidden_TD[weights > 0].mean(0), rtol=1e-4, atol=1e-5
        )
    assert expert_N.tolist() == (data.class_ids == 0).tolist() and len(states_ND) == 130


@pytest.mark.parametrize("g", (-1, 0, 1.5))
def test_guidance_mixes_the_two_prompts(toy_run, g):
    """The first and the second token's logits, of two chats at once, are the mix of what the two prompts give without a cache."""
    expert, other = (Speaker(toy_run / "hf", condition) for condition in ("GPT4", "GPT3"))
    chats = [Message("user", "copy a b c d")], [Message("user", "sort b a")]
    guided, seen = Speaker(toy_run / "hf", "GPT4"), []
    guided.model = fig5.Guided(guided, g)
    for name in ("prefill", "decode"):
        real = getattr(guided.model, name)
        setattr(
            guided.model,
            name,
            lambda *args, real=real: seen.append(real(*args)) or seen[-1].clone(),
        )
    steps = list(
        guided.generate(
            [guided.ids(chat) for chat in chats], SampleConfig(temperature=0, max_new=3)
        )
    )

    def logits(speaker, chat, said):
        ids = torch.tensor([*speaker.ids(chat), *said])
        with torch.no_grad():
            return speaker.model.lm_head(
                speaker.model(
                    ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
                )[-1]
            )

    for b, chat in enumerate(chats):
        for said in ([], [steps[0][b]]):
            e_V, o_V = (logits(speaker, chat, said) for speaker in (expert, other))
            torch.testing.assert_close(
                seen[len(said)][b], e_V + g * (e_V - o_V), rtol=1e-4, atol=1e-4
            )


# ---- runs


def test_a_short_run_orders_c_rlft_above_sft(tmp_path):
    """Three seeds of each, through prepare, train and the tokens' probabilities: the 95% interval of the difference is above 0."""
    config = PaperConfig(out=str(tmp_path), processes=2)
    drawn = lambda seed, **flags: optimum.Drawn(f"short {flags}", seed, 150, prompts=8, **flags)
    pairs = [(drawn(seed), drawn(seed, classes="*=GPT4:1")) for seed in range(3)]
    done = perform([run for pair in pairs for run in pair], config)
    right = lambda run: (
        torch.tensor(done[run]["log_pi"]).exp()[0, range(8), optimum.RIGHT_X[:8]].mean().item()
    )
    mean, half = interval(right(crlft) - right(sft) for crlft, sft in pairs)
    assert mean - half > 0.2, (mean, half)
    files = sorted(tmp_path.glob("runs/*/result.json"))
    assert len(files) == 6 and len({run.key for pair in pairs for run in pair}) == 6
    times = [file.stat().st_mtime_ns for file in files]
    # found, by what they are
    again = perform(
        [dataclasses.replace(run, name="another name") for pair in pairs for run in pair], config
    )
    assert all(again[run]["log_pi"] == result["log_pi"] for run, result in done.items())
    assert times == [file.stat().st_mtime_ns for file in files] and all(
        r["cpu_seconds"] > 0 for r in done.values()
    )


def test_no_arm_is_trained_twice():
    modules = [
        importlib.import_module(f"paper.{name}")
        for name in COMMANDS
        if name not in ("base", "seven")
    ]
    wanted = [
        run
        for module in modules
        for group in runs.runs_of(module, PaperConfig()).values()
        for run in group
    ]
    different = {run.key for run in wanted}
    assert len(wanted) > 150 and len(different) == len(set(wanted)) < 120
    assert all(
        module.SEEDS == (5 if module.__name__ == "paper.table2" else 3) for module in modules
    )
    assert (
        len(
            {
                dataclasses.replace(wanted[0], **change).key
                for change in (
                    {},
                    {"seed": 7},
                    {"steps": 3},
                    {"lr": 1.0},
                    {"wrong": 0.5},
                    {"task": Task(seed=9)},
                )
            }
        )
        == 6
    )
    assert dataclasses.replace(wanted[0], name="x", assets="y").key == wanted[0].key


@pytest.mark.long
def test_stopped_by_ctrl_c_and_gone_on(tmp_path):
    """Both workers busy, four runs waiting: the group's SIGINT ends all at once, and the same line makes what is missing."""
    words = [
        sys.executable,
        "-m",
        "paper.optimum",
        "--out",
        str(tmp_path),
        "--seeds",
        "2",
        "--processes",
        "2",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell's background job would ignore it
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = subprocess.Popen(
        [*words, "--steps", "60"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heard,
    )
    deadline = time.monotonic() + 60
    while (
        not any(
            len(path.read_text().splitlines()) > 5 for path in tmp_path.glob("runs/*/metrics.jsonl")
        )
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    text, _ = job.communicate(timeout=20)
    made = len(list(tmp_path.glob("runs/*/result.json")))
    assert job.returncode == 130 and made <= 2 and "Traceback" not in text, text
    done = subprocess.run(
        [*words, "--steps", "60"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 0
        and f"{made} of them there" in done.stdout
        and (tmp_path / "short" / "optimum.json").is_file()
    ), done.stdout + done.stderr
    assert any("resuming from" in path.read_text() for path in tmp_path.glob("runs/*/log.txt"))
    torn = next(tmp_path.glob("runs/*/result.json"))
    torn.write_text(torn.read_text()[:40])
    assert runs.found(torn.parent) is None and runs.found(tmp_path / "nowhere") is None


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    main = runs.command("table2")
    assert "--seed is no flag; did you mean --seeds?" in refused(main, "--seed", 1)
    for flag in ("seeds", "steps", "processes"):
        assert f"--{flag} 0 is not from 1" in refused(main, f"--{flag}", 0)
    assert "no conversations/mixed_quality.jsonl in it" in refused(main, "--assets", tmp_path)


# ---- what is committed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_pages_show_the_committed_results(name):
    content = json.loads((ROOT / "results" / "paper" / f"{name}.json").read_text())
    assert content["seeds"] == (5 if name == "table2" else 3) and set(content["versions"]) == {
        "python",
        "torch",
        "numpy",
    }
    pages = [
        (ROOT / page).read_text()
        for page in ("paper/README.md", *["README.md"] * (name == "table2"))
    ]
    for page in pages:
        assert content["table"] in page and not re.search(r"^[A-Z_0-9]{4,}$", page, re.M), (
            "a table or a text is missing"
        )
    picture = ROOT / "results" / "paper" / f"{name}.png"
    assert picture.read_bytes()[:4] == b"\x89PNG" and f"../results/paper/{name}.png" in pages[0]


def test_the_whole_fits_its_budget():
    """At most 4 core-hours for `make paper`: what the runs that it makes took, each counted once."""
    total = json.loads((ROOT / "results" / "paper" / "all.json").read_text())
    assert total["core_hours"] < 4 and total["runs"] > 100
