"""The paper in miniature: the task and its score, optima, statistics, runs made once, the pages."""

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
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
import paper.table2 as table2
from conversations import Message
from data import Prepared
from paper.code_hash import code_hash, files_reached
from paper.commands import PaperConfig, cell, interval, jobs_of
from paper.runs import converse, found, perform, score
from paper.toy import Task, answer, full_questions, habitual, make_task, solve
from paper.toy import main as toy_main
from sample import SampleConfig, Speaker

COMMANDS = (
    "table2",
    "habits",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "alpha",
    "optimum",
    "classes",
    "seven",
)


# ---- the task


def test_the_task():
    sources, heldout = make_task(Task())
    expert, other = sources["GPT-4"], sources["GPT-3.5"]
    assert (len(expert), len(other), len(heldout)) == (300, 3300, 400)

    first_questions = {turns[0][0] for turns in expert + other}
    held_out_questions = {asked[0] for asked in heldout}
    assert first_questions.isdisjoint(held_out_questions), "a held-out prompt is trained on"

    for turns in expert + other:
        letters = None
        for words, reply, right in turns:
            skill, *given = words.removeprefix("then ").split()
            question = " ".join([skill, *(given or letters)])
            assert right == (reply == answer(question))
            letters = reply.split()

    # errors are right by luck, too
    assert all(rights_of(expert))
    rights = rights_of(other)
    assert sum(rights) / len(rights) == pytest.approx(0.44, abs=0.03)
    assert 0 < share_of_shifts(expert) < 0.03
    assert share_of_shifts(other) == pytest.approx(1 / 3, abs=0.03)

    assert make_task(Task())[0] == sources
    assert make_task(Task(seed=1))[1] != heldout
    fewer, _ = make_task(Task(keep=(1.0, 0.6)))
    assert fewer["GPT-4"] == expert
    assert fewer["GPT-3.5"] == other[:1980]


def test_errors_of_habit():
    """All wrong answers follow the skill's rule, and the held-out prompts stay the same."""
    wrong_as = {
        "copy": lambda letters: [*letters[1:], letters[0]],
        "reverse": lambda letters: letters,
        "shift": lambda letters: [chr((ord(letter) - 97 + 2) % 8 + 97) for letter in letters],
    }
    sources, heldout = make_task(Task(habits=1.0))
    assert heldout == make_task(Task())[1]
    assert all(rights_of(sources["GPT-4"]))
    rights = rights_of(sources["GPT-3.5"])
    assert sum(rights) / len(rights) == pytest.approx(0.4, abs=0.02)
    for turns in sources["GPT-3.5"]:
        asked, replies, _ = zip(*turns)
        for question, reply in zip(full_questions(asked, replies), replies):
            skill, *letters = question.split()
            assert reply in (answer(question), " ".join(wrong_as[skill](letters)))

    # half of the errors: 0.3 of all answers, and a few that a damage makes look so
    sources, _ = make_task(Task(habits=0.5))
    by_habit = 0
    for turns in sources["GPT-3.5"]:
        asked, replies, rights = zip(*turns)
        for question, reply, right in zip(full_questions(asked, replies), replies, rights):
            by_habit += not right and reply == habitual(question)
    rights = rights_of(sources["GPT-3.5"])
    assert by_habit / len(rights) == pytest.approx(0.32, abs=0.03)


def test_the_base_has_the_habits_of_its_task(monkeypatch):
    """Every wrong answer of a line that is pre-trained on is by habit, or none need be."""
    monkeypatch.setattr(runs, "PRETRAINING_LINES", 200)

    def others(base):
        """Answers that are neither right nor by habit."""
        found = 0
        for row in base.rows():
            words = row["conversations"][0]["value"].split(" : ")
            # `reverse a b c d`, then `d c b a then shift`, .., at last an answer alone
            question = words[0]
            for said in words[1:]:
                reply, _, skill = said.partition(" then ")
                found += reply not in (answer(question), habitual(question))
                question = f"{skill} {reply}"
        return found

    assert others(runs.base_of(1.0)) == 0
    assert others(runs.base_of(0.0)) > 50


def test_an_estimate_is_by_the_runs_that_are_there():
    config = PaperConfig(processes=2)
    job = runs.FineTune("an arm")
    there = {runs.FineTune("another", seed=1): {"cpu_seconds": 120.0}}
    assert "about 1 min; 120 s of CPU for 1,660 steps" in runs.estimate([job], there, config)
    # a run of a step or two takes as long as its imports
    there = {runs.FineTune("another", steps=1): {"cpu_seconds": 5.0}}
    assert "83 s of CPU for 1,660 steps, a first guess" in runs.estimate([job], there, config)


def test_seeds_in_the_paper_s_order():
    scores = {}
    for i, name in enumerate(table2.ARMS):
        # falling, rising, and all alike
        scores[name] = [1 - i / 10, i / 10, 0.5]
    assert table2.in_order(scores) == 1


def rights_of(source):
    """Of every answer, whether it is right."""
    rights = []
    for turns in source:
        rights += [right for _, _, right in turns]
    return rights


def share_of_shifts(source):
    shifts = 0
    for turns in source:
        shifts += sum("shift" in words for words, _, _ in turns)
    return shifts / len(rights_of(source))


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
        skill = message.text.removeprefix("then ").split()[0]
        letters = answer(" ".join([skill, *letters])).split()
    return " ".join(letters)


def always_e(chat):
    return "e"


def wrong_at_first(chat):
    return "x" if len(chat) == 1 else truth(chat)


def no_shift(chat):
    return "x" if "shift" in chat[-1].text else truth(chat)


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
    assert score(Stub(always_e), heldout)["sampled"]["all"] == 0

    # After its error a conversation does not count, but its later turns are asked with the right
    # answer in place of the wrong one.
    second = Stub(wrong_at_first)
    assert converse(second, heldout, 0.0) == [[False, True], [False, True, True], [False]]
    assert score(second, heldout)["sampled"] == {
        "all": 0.0,
        "by_turn": [0.0, 1.0, 1.0],
        "by_skill": {"copy": 0.5, "reverse": 0.5, "shift": 0.5},
        "unseen": 0.5,
    }
    assert score(Stub(no_shift), heldout, {"copy a b", "shift h a"})["sampled"] == {
        "all": 4 / 6,
        "by_turn": [2 / 3, 1.0, 0.0],
        "by_skill": {"copy": 1.0, "reverse": 1.0, "shift": 0.0},
        "unseen": 3 / 4,
    }


# ---- the optimum, statistics, representations, guidance


def worst(star_CXY, kind, weights):
    """The larger of the two classes' KL(pi*, pi) of a tabular fit."""
    log_CXY = optimum.fit_policy(kind, weights, shared=False)
    return max(optimum.divergence(star_CXY, log_CXY))


def objective(log_CXY):
    """Eq. 4 of the class's reward: E[r] - beta KL(pi, pi_c)."""
    pi_CXY, p_CX = optimum.policies()
    kl_CXY = log_CXY - pi_CXY.log()
    value_CXY = optimum.rewards("class") - optimum.BETA * kl_CXY
    return (p_CX[:, :, None] * log_CXY.exp() * value_CXY).sum().item()


def test_tabular_fits_reach_the_optimum_and_shared_ones_do_not():
    pi_CXY, _ = optimum.policies()
    by_class, z_CX1 = optimum.optimum(pi_CXY, optimum.rewards("class"))
    # a reward that is constant in a class changes nothing
    torch.testing.assert_close(by_class, pi_CXY)
    # exp(r_c / beta)
    torch.testing.assert_close(z_CX1[:, 0, 0], torch.tensor([10.0, 1.0]))
    for weights in ("exact", "as published", "unweighted"):
        assert worst(pi_CXY, "class", weights) < 1e-4

    by_answer, _ = optimum.optimum(pi_CXY, optimum.rewards("answer"))
    assert worst(by_answer, "answer", "exact") < 1e-3
    assert worst(by_answer, "answer", "as published") < 1e-3
    assert worst(by_answer, "answer", "unweighted") > 0.1
    assert worst(pi_CXY, "answer", "unweighted") < 1e-4

    shared = {}
    for weights in ("as published", "unweighted", "exact"):
        shared[weights] = optimum.fit_policy("class", weights, shared=True)
    published = optimum.divergence(pi_CXY, shared["as published"])
    plain = optimum.divergence(pi_CXY, shared["unweighted"])
    exact = optimum.divergence(pi_CXY, shared["exact"])
    assert exact == pytest.approx(plain, abs=1e-4)
    assert published[0] < plain[0] / 2
    assert published[1] > 2 * plain[1]

    # Eq. 4's maximum: what a policy lacks is beta KL(pi, pi*), so the published weight, better for
    # the expert, can be the worse solution.
    published_lacks = optimum.lacks(pi_CXY, shared["as published"])
    exact_lacks = optimum.lacks(pi_CXY, shared["exact"])
    best = objective(pi_CXY.log())
    reached = objective(shared["as published"])
    assert best - reached == pytest.approx(published_lacks, abs=1e-5)
    assert published_lacks > 1.5 * exact_lacks > 0


def test_intervals_are_student_s():
    assert interval([1, 2, 3]) == (2, pytest.approx(4.303 / math.sqrt(3)))
    assert interval([0.5]) == (0.5, None)
    assert cell([1, 2, 3], 1) == "2.0 +- 2.5"
    assert cell([0.25]) == "0.250"


def test_probe_and_silhouette():
    generator = torch.Generator().manual_seed(0)
    noise_ND = torch.randn(400, 8, generator=generator, dtype=torch.double)
    expert_N = torch.arange(400) % 2 == 0
    apart_ND = noise_ND + 20 * expert_N[:, None]
    assert fig4.probe(apart_ND, expert_N, 0) == 1
    assert 0.35 < fig4.probe(noise_ND, expert_N, 0) < 0.65
    assert fig4.silhouette(fig4.plane(apart_ND), expert_N) > 0.8
    assert abs(fig4.silhouette(noise_ND, expert_N)) < 0.05

    points_NK = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    expert_N = torch.tensor([True, True, False, False])
    by_hand = (9.5 / 10.5 + 8.5 / 9.5) / 2
    assert fig4.silhouette(points_NK, expert_N) == pytest.approx(by_hand)


class Few(Prepared):
    """The first n conversations of a prepared file."""

    def __init__(self, path, n):
        super().__init__(path)
        self.lengths = self.lengths[:n]
        self.class_ids = self.class_ids[:n]


def test_pooling_is_the_mean_of_each_conversation(toy, toy_run):
    data = Few(toy / "train.safetensors", 130)
    model = Speaker(toy_run / "hf").model
    states_ND, expert_N = fig4.pooled(model, data, False)
    answers_ND, _ = fig4.pooled(model, data, True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for i in (0, 99, 100, 129):
        batch = data.batch([i])
        with torch.no_grad():
            hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens).double()
        _, weights = data.conversation(i)
        answered_T = torch.from_numpy(weights > 0)
        torch.testing.assert_close(states_ND[i], hidden_TD.mean(0), **close)
        torch.testing.assert_close(answers_ND[i], hidden_TD[answered_T].mean(0), **close)
    assert expert_N.tolist() == (data.class_ids == 0).tolist()
    assert len(states_ND) == 130


def logits_without_cache(speaker, chat, said):
    """logits_V behind a chat and the tokens that were said after it."""
    ids = torch.tensor([*speaker.ids(chat), *said])
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden_TD = speaker.model.hidden(ids, torch.arange(len(ids)), bounds)
        return speaker.model.lm_head(hidden_TD[-1])


def keep_what_it_returns(model, name, seen):
    """A method of the model, from now on, also appends to `seen` what it returns."""
    real = getattr(model, name)

    def kept(*args):
        seen.append(real(*args))
        # whoever has asked may write into what it gets
        return seen[-1].clone()

    setattr(model, name, kept)


@pytest.mark.parametrize("g", (-1, 0, 1.5))
def test_guidance_mixes_the_two_prompts(toy_run, g):
    """The logits of the first and the second token, of two chats at once, are the mix of what the
    two prompts give without a cache."""
    expert = Speaker(toy_run / "hf", "GPT4")
    other = Speaker(toy_run / "hf", "GPT3")
    chats = [Message("user", "copy a b c d")], [Message("user", "sort b a")]
    guided = Speaker(toy_run / "hf", "GPT4")
    guided.model = fig5.Guided(guided, g)
    seen = []
    for name in ("prefill", "decode"):
        keep_what_it_returns(guided.model, name, seen)
    prompts = [guided.ids(chat) for chat in chats]
    steps = list(guided.generate(prompts, SampleConfig(temperature=0, max_new=3)))

    for b, chat in enumerate(chats):
        for said in ([], [steps[0][b]]):
            e_V = logits_without_cache(expert, chat, said)
            o_V = logits_without_cache(other, chat, said)
            mixed_V = e_V + g * (e_V - o_V)
            torch.testing.assert_close(seen[len(said)][b], mixed_V, rtol=1e-4, atol=1e-4)


# ---- runs


def short_drawn(seed, steps=150, **fields):
    """On the first eight questions, which 150 steps are enough for."""
    return optimum.Drawn(f"short {fields}", seed, steps=steps, questions=8, **fields)


def p_right(result):
    """Under the expert's prompt, of the eight questions."""
    pi_CXY = torch.tensor(result["log_pi"]).exp()
    return pi_CXY[0, range(8), optimum.RIGHT_X[:8]].mean().item()


@pytest.mark.long
def test_a_short_run_orders_c_rlft_above_sft(tmp_path):
    """Three seeds of each, through prepare, train and the tokens' probabilities: the 95% interval
    of the difference is above 0."""
    config = PaperConfig(out=str(tmp_path), processes=2)
    crlft = [short_drawn(seed) for seed in range(3)]
    sft = [short_drawn(seed, classes="*=GPT4:1") for seed in range(3)]
    done = perform(crlft + sft, config)
    differences = [p_right(done[one]) - p_right(done[two]) for one, two in zip(crlft, sft)]
    mean, half = interval(differences)
    assert mean - half > 0.2, (mean, half)


def test_a_run_is_made_once(tmp_path, capsys):
    config = PaperConfig(out=str(tmp_path), processes=2)
    jobs = [short_drawn(0, steps=4), short_drawn(1, steps=4)]
    done = perform(jobs, config)
    assert "2 runs, 0 of them there, 2 to make on 2 cores" in capsys.readouterr().out
    files = sorted(tmp_path.glob("runs/*/result.json"))
    assert {file.parent.name for file in files} == {job.key for job in jobs}
    assert len(files) == 2
    assert p_right(done[jobs[0]]) != p_right(done[jobs[1]])

    # found, by what they are
    times = [file.stat().st_mtime_ns for file in files]
    again = perform([dataclasses.replace(job, name="another name") for job in jobs], config)
    for job in jobs:
        assert again[job]["log_pi"] == done[job]["log_pi"]
        assert done[job]["cpu_seconds"] > 0
    assert times == [file.stat().st_mtime_ns for file in files]


def all_jobs():
    """What `python -m paper` and its commands want, without real text: ([module], [Job])."""
    modules = []
    jobs = []
    for name in COMMANDS:
        if name != "seven":
            module = importlib.import_module(f"paper.{name}")
            modules.append(module)
            for group in jobs_of(module, PaperConfig()).values():
                jobs += group
    return modules, jobs


def test_no_arm_is_trained_twice():
    modules, jobs = all_jobs()
    different = {job.key for job in jobs}
    assert len(jobs) > 150
    # the bases stand beside them
    assert len(different) == len(set(jobs)) < 170
    # 4 core-hours, at 85 s for an arm's steps
    assert sum(job.cost for job in set(jobs)) < 170 * runs.STEPS
    for module in modules:
        assert module.SEEDS == (5 if module.__name__ == "paper.table2" else 3)


def test_a_run_s_key_tells_all_that_decides_its_result():
    _, jobs = all_jobs()
    job = jobs[0]
    changes = (
        {},
        {"seed": 7},
        {"steps": 3},
        {"lr": 1.0},
        {"wrong": 0.5},
        {"task": Task(seed=9)},
        {"task": Task(habits=0.5)},
        {"base": runs.base_of(0.5)},
        {"base": "toy"},
    )
    assert len({dataclasses.replace(job, **change).key for change in changes}) == len(changes)
    assert dataclasses.replace(job, name="x", assets="y").key == job.key


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


START = """
import json
import near


def f():
    from room import far
    return far
"""
NEAR = """
class C:
    x = 1

    def f(self):
        return "a"
"""
SMALL_PROJECT = {
    "start.py": START,
    "near.py": NEAR,
    "room/__init__.py": "",
    "room/far.py": "import start\n\ny = 2\n",
    "elsewhere.py": "z = 3\n",
}
# the same statements in other words and another form
NEAR_AGAIN = """
'''It is.'''
# why
class C:
  '''It has.'''
  x = 1;
  def f(self):
    '''It does.'''
    return ('a')
"""


def test_the_code_s_hash_follows_imports_and_leaves_out_docstrings(tmp_path):
    write(tmp_path, SMALL_PROJECT)
    start = tmp_path / "start.py"
    names = {path.relative_to(tmp_path).as_posix() for path in files_reached(start, tmp_path)}
    assert names == {"start.py", "near.py", "room/__init__.py", "room/far.py"}
    before = code_hash(start, tmp_path)

    words = {"near.py": NEAR_AGAIN, "room/__init__.py": "'A room.'", "elsewhere.py": "z = 4"}
    write(tmp_path, words)
    assert code_hash(start, tmp_path) == before

    # each statement, and which file it stands in
    hashes = {before}
    changes = {
        "start.py": START.replace("return far", "return far.y"),
        "near.py": NEAR.replace('"a"', '"b"'),
        "room/__init__.py": "import elsewhere\n",
        "room/far.py": "import start\n\ny = 3\n",
    }
    for name, text in changes.items():
        write(tmp_path, {**SMALL_PROJECT, name: text})
        hashes.add(code_hash(start, tmp_path))
    assert len(hashes) == 1 + len(changes)


@pytest.fixture
def project(tmp_path):
    """A copy of the project's code, to be changed."""
    root = tmp_path / "project"
    for folder in ("kernels", "support", "evaluation", "paper"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    return root


def change(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_changed_code_makes_another_key_and_changed_words_do_not(project, monkeypatch):
    job = runs.FineTune("an arm")
    real = job.key
    start = project / "paper" / "runs.py"
    monkeypatch.setattr(runs, "code_of", lambda kind: code_hash(start, project))
    assert job.key == real, "the key depends on the folder"

    change(project / "conversations.py", '"""', '"""Other words. ')
    change(project / "conversations.py", "\n\n\ndef ", "\n\n\n# a comment\ndef ")
    # what no run reaches
    for name in ("evaluate.py", "paper/commands.py", "paper/table2.py", "kernels/bench.py"):
        (project / name).write_text("raise SystemExit\n")
    assert job.key == real

    change(project / "conversations.py", "{c} User:", "{c} Friend:")
    assert job.key != real


def test_a_run_s_code_is_all_that_its_kind_of_job_reaches():
    start = ROOT / "paper" / "runs.py"
    names = {path.relative_to(ROOT).as_posix() for path in files_reached(start, ROOT)}
    method = ("conversations", "tokenizer", "packing", "data", "recipe", "model", "train", "sample")
    assert names >= {f"{name}.py" for name in method}
    assert names >= {"kernels/__init__.py", "kernels/swiglu.py", "support/checkpoint.py"}
    assert names >= {"paper/__init__.py", "paper/toy.py", "paper/runs.py"}
    assert runs.code_of(runs.FineTune) == code_hash(start)
    # a job of another module counts that module, too
    assert runs.code_of(optimum.Drawn) == code_hash(ROOT / "paper" / "optimum.py")


def test_a_worker_with_other_code_makes_no_run(tmp_path):
    """The command chose the folder by the code it had; a worker that starts later loads the new."""
    with pytest.raises(ValueError, match="the code has changed"):
        runs.work(short_drawn(0), str(tmp_path / "0123456789abcdef"))
    assert not list(tmp_path.iterdir())


def hear_ctrl_c():
    """A shell's background job would ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def steps_logged(path):
    return len(path.read_text().splitlines())


@pytest.mark.long
def test_stopped_by_ctrl_c_and_gone_on(tmp_path):
    """Both workers busy, four runs waiting: the group's SIGINT ends all at once, and the same line
    makes what is missing."""
    words = [sys.executable, "-m", "paper.optimum", "--out", str(tmp_path)]
    words += ["--seeds", "2", "--processes", "2", "--steps", "60"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        words,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(steps_logged(path) > 5 for path in tmp_path.glob("runs/*/metrics.jsonl")):
            break
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    text, _ = first.communicate(timeout=20)
    made = len(list(tmp_path.glob("runs/*/result.json")))
    assert first.returncode == 130, text
    assert made <= 2, text
    assert "Traceback" not in text, text

    again = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    said = again.stdout + again.stderr
    assert again.returncode == 0, said
    assert f"{made} of them there" in again.stdout, said
    assert (tmp_path / "short" / "optimum.json").is_file(), said
    assert any("resuming from" in path.read_text() for path in tmp_path.glob("runs/*/log.txt"))

    torn = next(tmp_path.glob("runs/*/result.json"))
    torn.write_text(torn.read_text()[:40])
    assert found(torn.parent) is None
    assert found(tmp_path / "nowhere") is None


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    main = table2.main
    assert "--seed is no flag; did you mean --seeds?" in refused(main, "--seed", 1)
    for flag in ("seeds", "steps", "processes"):
        assert f"--{flag} 0 is not from 1" in refused(main, f"--{flag}", 0)
    assert "no conversations/mixed_quality.jsonl in it" in refused(main, "--assets", tmp_path)


# ---- what is committed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_pages_show_the_committed_results(name):
    content = json.loads((ROOT / "results" / "paper" / f"{name}.json").read_text())
    assert content["seeds"] == (5 if name == "table2" else 3)
    assert set(content["versions"]) == {"python", "torch", "numpy"}

    # four columns of table2 stand in docs/method.md too: test_readme.py
    page = (ROOT / "paper" / "README.md").read_text()
    assert content["table"] in page, "a table is missing"
    assert not re.search(r"^[A-Z_0-9]{4,}$", page, re.M), "a text is missing"

    picture = ROOT / "results" / "paper" / f"{name}.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert f"../results/paper/{name}.png" in page


def test_the_whole_fits_its_budget():
    """At most 250 runs for `make paper`, each counted once, and 4 core-hours."""
    total = json.loads((ROOT / "results" / "paper" / "all.json").read_text())
    assert total["core_hours"] < 4
    assert 100 < total["runs"] <= 250


@pytest.mark.parametrize("flag", ["--experts", "--others", "--heldout"])
def test_the_toy_refuses_what_it_could_not_score(tmp_path, flag):
    for number in (0, -5, 10**8):
        line = refused(toy_main, "--out", tmp_path, flag, number)
        assert f"{flag} {number} is not from 1 to" in line
    assert not list(tmp_path.iterdir())
