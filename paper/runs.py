"""The runs of the paper in miniature: the real code on the toy's task, each made once.

A `Job` holds all that decides a run: data, a `--classes` table, a template, a budget and a seed.
`perform` makes the run of each job, by what a user would call:

    rows -> data.prepare -> train.main -> sample.Speaker -> result.json

The folder is out/paper/runs/<key>, where the key is a hash of the job and of the project's code.
Whoever asks for the same job again finds its result there; after a change of the code nobody does.
A run is a process of one thread, and there are as many at a time as cores. CPU time is what the
processes used, summed.

From top to bottom: a run's data and training, the kinds of jobs, the score, many runs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch

from conversations import Message
from data import PrepareConfig, Prepared, prepare
from paper.code_hash import code_hash
from paper.toy import (
    PAPER,
    Task,
    full_questions,
    make_conversation,
    make_task,
    solve,
    train_tokenizer,
)
from sample import SampleConfig, Speaker
from support.files import written_whole
from support.metrics import read_metrics
from train import main as train

# The budget of every arm: 1,660 steps are 10 epochs of the whole data, to 1%.
STEPS = 1660
EPOCHS = 10
# All else is train.py's default.
BATCH_TOKENS = 768
LR = 2e-3
# Of a run from random weights.
BASE_STEPS = 2490
BASE_LR = 3e-3
PRETRAINING_LINES = 13_200
# With the weights of the two classes: the expert's, then the other's.
TABLE = "GPT-4=GPT4:{},*=GPT3:{}"
# So many seeds can be asked for.
MOST_SEEDS = 10
# Of CPU time: the first guess of how long a run takes.
SECONDS_PER_STEP = 0.05
# Runs that are there correct the guess, if they have so many steps.
FEWEST_STEPS = 100
# An answer has at most four letters, each a token, and its end. Three times that is room enough
# to see that a model does not stop.
MAX_NEW = 12


# ---- a run's data and training


def prepared(
    path: Path,
    rows: list[dict],
    classes: str,
    tokenizer: str | Path,
    template: str = "before_speaker",
    max_len: int = 128,
) -> Prepared:
    """The Prepared of these rows: `data.py prepare` with `path` as --out, the rows beside it."""
    rows_file = path.with_suffix(".jsonl")
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        files=(str(rows_file),),
        tokenizer=str(tokenizer),
        out=str(path),
        classes=classes,
        template=template,
        max_len=max_len,
        processes=1,
    )
    prepare(config)
    return Prepared(path)


def train_on(
    folder: Path,
    rows: list[dict],
    classes: str,
    template: str,
    flags: dict,
    tokenizer: str | Path | None = None,
    max_len: int = 128,
) -> dict:
    """`train.py` with these flags on these rows, in `folder`; the prepared file's metadata.

    The tokenizer is the toy's, which all runs share, unless another is given.
    """
    tokenizer = tokenizer or tokenizer_path(folder.parent.parent)
    data = prepared(
        folder / "train.safetensors", rows, classes, tokenizer, template, max_len=max_len
    )
    words = []
    for name, value in {"data": data.path, "out": folder, **flags}.items():
        words += [f"--{name}", str(value)]
    train(words)
    return data.meta


def sharegpt(turns: list[tuple], label: str = "", wrong: float | None = None) -> dict:
    """A conversation of `make_conversation` in ShareGPT's form.

    With `wrong` each answer carries a weight: 1 if it is right, else `wrong`.
    """
    messages = []
    for words, reply, right in turns:
        answer = {"from": "gpt", "value": reply}
        if wrong is not None:
            answer["weight"] = 1.0 if right else wrong
        messages += [{"from": "human", "value": words}, answer]
    return {"model": label, "conversations": messages}


# ---- the kinds of jobs


@functools.cache
def code_of(kind: type) -> str:
    """The hash of the code that a kind of job needs.

    Computed once: a process goes on with the code that it has loaded, and the files may change.
    """
    return code_hash(Path(inspect.getfile(kind)).resolve())


@dataclass(frozen=True)
class Job:
    """What `perform` makes once. Two jobs are equal when their runs would be."""

    # for the progress line
    name: str = field(compare=False)
    seed: int = 0
    steps: int | None = STEPS
    assets: str = field(default="", compare=False)

    @property
    def code(self) -> str:
        """The hash of the code that makes it, for the key."""
        return code_of(type(self))

    @property
    def key(self) -> str:
        """The name of its run's folder: a hash of the fields that count and of the code."""
        counted = {f.name for f in dataclasses.fields(self) if f.compare}
        facts = {
            "kind": type(self).__name__,
            "code": self.code,
            "batch_tokens": BATCH_TOKENS,
            "epochs": EPOCHS,
        }
        for name, value in dataclasses.asdict(self).items():
            if name in counted:
                facts[name] = value
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cost(self) -> float:
        """About how long the run takes, in steps of BATCH_TOKENS."""
        return self.steps

    @property
    def needs(self) -> "Job | None":
        """The job that has to be made before this one."""
        return None

    def do(self, folder: Path) -> dict:
        """Make the run in its folder; returns the result, for JSON."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pretrain(Job):
    """The base model: it knows the skills as well as the other source does, and has seen no prompt.

    It learns lines like `reverse a c b d : d b c a then shift : e c d b`, right 4 times in 10,
    wrong by that source's habits where it has any, without classes and weights. data.py has no way
    to train on bare text: a line stands behind `Assistant:`, which is no arm's prompt, and ends
    with `<|end_of_turn|>`. No line begins with a prompt that is held out for any seed.
    """

    steps: int = BASE_STEPS
    # as in Task
    habits: float = 0.0

    def do(self, folder: Path) -> dict:
        flags = {
            "model": "toy",
            "seed": self.seed,
            "steps": self.steps,
            "lr": BASE_LR,
            "batch_tokens": BATCH_TOKENS,
        }
        train_on(folder, self.rows(), "*=text:1", "none", flags)
        return {}

    def rows(self) -> list[dict]:
        held_out = set()
        for seed in range(MOST_SEEDS):
            _, asked_of_seed = make_task(Task(seed=seed))
            held_out.update(asked[0] for asked in asked_of_seed)
        rng = random.Random("base")
        rows = []
        while len(rows) < PRETRAINING_LINES:
            turns = make_conversation(rng, 0.4, [1, 1, 1], self.habits)
            if turns[0][0] in held_out:
                continue
            text = " ".join(f"{words} : {reply}" for words, reply, _ in turns)
            rows.append({"conversations": [{"from": "gpt", "value": text}]})
        return rows


def base_of(habits: float) -> Pretrain:
    """The base of a task whose weaker source has so many habits."""
    return Pretrain("pre-training", habits=habits)


@dataclass(frozen=True)
class FineTune(Job):
    """An arm with one seed: the task's conversations under a --classes table and a template.

    steps None: EPOCHS epochs.
    """

    task: Task = Task()
    classes: str = TABLE.format(1, 0.1)
    template: str = "before_speaker"
    # The weight of a wrong answer, beside 1 for a right one: a reward for each message, not for
    # its source.
    wrong: float | None = None
    lr: float = LR
    # What is fine-tuned; or a preset, for random weights.
    base: str | Job = base_of(0.0)

    @property
    def cost(self) -> float:
        return self.steps or STEPS * self.task.size / Task().size

    @property
    def needs(self) -> Job | None:
        return self.base if isinstance(self.base, Job) else None

    def do(self, folder: Path) -> dict:
        """{"steps": taken, "scores": {condition: `score` under its prompt}}"""
        sources, heldout = make_task(self.task)
        rows = self.rows(sources)
        meta = train_on(folder, rows, self.classes, self.template, self.flags(folder))
        steps = read_metrics(folder / "metrics.jsonl")[-1]["step"]

        # A class of weight 0 has not been trained, so its prompt means nothing to the model.
        conditions = [c["condition"] for c in meta["classes"] if c["weight"]]
        trained = questions_in(sources)
        scores = {}
        for condition in dict.fromkeys(conditions):
            speaker = Speaker(folder / "hf", condition, device="cpu", seed=self.seed)
            scores[condition] = score(speaker, heldout, trained)
        return {"steps": steps, "scores": scores}

    def rows(self, sources: dict[str, list]) -> list[dict]:
        """What is trained on, in ShareGPT's form."""
        rows = []
        for label, chats in sources.items():
            rows += [sharegpt(turns, label, self.wrong) for turns in chats]
        return rows

    def flags(self, folder: Path) -> dict:
        """train.py's."""
        model = folder.parent / self.base.key / "hf" if self.needs else self.base
        budget = {"steps": self.steps} if self.steps else {"epochs": EPOCHS}
        return {
            "model": model,
            "seed": self.seed,
            "lr": self.lr,
            "batch_tokens": BATCH_TOKENS,
            **budget,
        }


def questions_in(sources: dict[str, list]) -> set[str]:
    """Every question that stands in the training data, in full."""
    questions = set()
    for chats in sources.values():
        for turns in chats:
            asked, replies, _ = zip(*turns)
            questions.update(full_questions(asked, replies))
    return questions


# ---- the score


def converse(speaker: Speaker, heldout: list[list[str]], temperature: float) -> list[list[bool]]:
    """Whether each answer was right, by held-out conversation and turn.

    Up to its first error a conversation is the model's own. There the right answer is put in
    place of the wrong one, so that later turns are asked of all.
    """
    # all conversations at once
    config = SampleConfig(temperature=temperature, max_new=MAX_NEW, batch=len(heldout))
    chats = [[] for _ in heldout]
    outcome = [[] for _ in heldout]
    for turn in range(max(map(len, heldout))):
        live = [i for i, asked in enumerate(heldout) if turn < len(asked)]
        for i in live:
            chats[i].append(Message("user", heldout[i][turn]))
        prompts = [speaker.ids(chats[i]) for i in live]
        for i, (ids, _) in zip(live, speaker.answer_all(prompts, config)):
            right = solve(heldout[i])[turn]
            outcome[i].append(speaker.text(ids) == right)
            chats[i].append(Message("assistant", right))
    return outcome


def score(speaker: Speaker, heldout: list[list[str]], trained: set[str] = frozenset()) -> dict:
    """{"sampled": shares, "greedy": shares}, at temperature 1 and 0; see `shares`."""
    questions = [full_questions(asked, solve(asked)) for asked in heldout]
    result = {}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        outcome = converse(speaker, heldout, temperature)
        result[how] = shares(outcome, questions, trained)
    return result


def shares(outcome: list[list[bool]], questions: list[list[str]], trained: set[str]) -> dict:
    """{"all", "by_turn", "by_skill", "unseen"} of what `converse` returns.

    all: `unbroken`, the score of an arm. The others are shares of right answers where what came
    before is right: by turn, by skill, and of the questions (skill and letters) that stand nowhere
    in `trained`, neither as a first question nor as a follow-up.
    """
    by_turn = [[] for _ in range(max(map(len, outcome)))]
    by_skill = {skill: [] for skill in PAPER}
    unseen = []
    for rights, asked in zip(outcome, questions):
        for turn, (right, question) in enumerate(zip(rights, asked)):
            skill = question.split()[0]
            by_turn[turn].append(right)
            by_skill[skill].append(right)
            if question not in trained:
                unseen.append(right)
    return {
        "all": unbroken(outcome),
        "by_turn": [share(rights) for rights in by_turn],
        "by_skill": dict(zip(PAPER, map(share, by_skill.values()))),
        "unseen": share(unseen),
    }


def unbroken(outcome: list[list[bool]]) -> float:
    """The share of all questions answered right in a conversation without an error before."""
    counted = []
    for rights in outcome:
        for turn in range(len(rights)):
            counted.append(all(rights[: turn + 1]))
    return share(counted)


def share(rights: Iterable[bool]) -> float:
    """The share of those that are true; 0 of none."""
    rights = list(rights)
    return sum(rights) / max(1, len(rights))


# ---- many runs


def perform(jobs: list[Job], config) -> dict[Job, dict]:
    """{job: its result}, also of the jobs that these need; what is missing is made now.

    config: a PaperConfig. On config.processes cores, the longest runs first.
    """
    needed = [job.needs for job in jobs if job.needs]
    done = perform(needed, config) if needed else {}

    # found by its key: made before, by this command or another
    folders = {job: Path(config.out) / "runs" / job.key for job in jobs}
    for job, folder in folders.items():
        result = found(folder)
        if result:
            done[job] = result
    todo = [job for job in folders if job not in done]
    if not todo:
        return done

    todo.sort(key=lambda job: job.cost, reverse=True)
    print(estimate(todo, {job: done[job] for job in folders if job in done}, config), flush=True)
    make_tokenizer(tokenizer_path(Path(config.out)))
    return done | make({job: folders[job] for job in todo}, config.processes)


def estimate(todo: list[Job], there: dict[Job, dict], config) -> str:
    """How many runs there are to make, and about how long they take."""
    pace = SECONDS_PER_STEP
    basis = "a first guess"
    # a run of a few steps takes as long as its start, and says nothing of the others
    measured = [job for job in there if job.cost >= FEWEST_STEPS]
    if measured:
        seconds = sum(there[job]["cpu_seconds"] for job in measured)
        pace = seconds / sum(job.cost for job in measured)
        basis = "as those that are there took"
    minutes = sum(job.cost for job in todo) * pace / config.processes / 60
    return (
        f"{len(there) + len(todo)} runs, {len(there)} of them there, {len(todo)} to make on "
        f"{config.processes} cores, about {minutes:.0f} min; {pace * STEPS:.0f} s of CPU for "
        f"{STEPS:,} steps, {basis}"
    )


def found(folder: Path) -> dict | None:
    """The result in a run's folder, with that folder; None where there is none, or half of one."""
    try:
        return json.loads((folder / "result.json").read_text()) | {"folder": str(folder)}
    except (OSError, ValueError):
        return None


def tokenizer_path(out: Path) -> Path:
    """Of the toy's tokenizer, which is made once, as runs are: other code makes another."""
    return out / f"tokenizer-{code_of(Job)[:16]}.model"


def make_tokenizer(path: Path) -> None:
    """Train the toy's tokenizer, which all runs share, unless it is there."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sources, _ = make_task(Task())
    rows = []
    for chats in sources.values():
        rows += [sharegpt(turns) for turns in chats]
    with written_whole(path) as partial:
        train_tokenizer(rows, partial, ("GPT4", "GPT3", "GPT2"))


def make(todo: dict[Job, Path], processes: int) -> dict[Job, dict]:
    """{job: its result} of {job: its folder}, each made in a worker process."""
    # SIGTERM leaves by the `except` below, as Ctrl-C does, so that no worker is left behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker)
    try:
        futures = {pool.submit(work, job, str(folder)): job for job, folder in todo.items()}
        done = collect(futures, processes)
    except BaseException as error:
        # Ctrl-C, a full disk: what runs now saves and leaves, what waits does not begin.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "a worker was killed (memory?); the same line goes on, with --processes "
                f"{max(1, processes // 2)} on half the memory"
            ) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    pool.shutdown()
    return done


def collect(futures: dict[Future, Job], processes: int) -> dict[Job, dict]:
    """{job: its result}; at each run's end a line says how long the others will take."""
    total_cost = sum(job.cost for job in futures.values())
    done = {}
    cost = 0.0
    seconds = 0.0
    for future in as_completed(futures):
        job = futures[future]
        done[job] = future.result()
        # the rest takes as many seconds per cost as what is done has taken
        cost += job.cost
        seconds += done[job]["cpu_seconds"]
        minutes_left = seconds / cost * (total_cost - cost) / processes / 60
        print(
            f"[{len(done)}/{len(futures)}] {job.name}, seed {job.seed}: "
            f"{done[job]['cpu_seconds']:.0f} s of CPU; about {minutes_left:.0f} min left",
            flush=True,
        )
    return done


def start_worker() -> None:
    # the same numbers on a machine with a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def work(job: Job, folder: str) -> dict:
    """In a worker: make a job's run; its result, as `found` finds it.

    The CPU time in it is that of all attempts.
    """
    began = cpu_seconds()
    folder = Path(folder)
    # A worker loads the code when it starts, later than the command that chose the folder did.
    if job.key != folder.name:
        raise ValueError("the code has changed since this command began; start the same line again")
    folder.mkdir(parents=True, exist_ok=True)
    stopped = False
    with (
        open(folder / "log.txt", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            result = job.do(folder)
        except SystemExit:
            # train.py has saved after a signal
            stopped = True
        finally:
            with open(folder / "cpu_seconds.txt", "a") as file:
                file.write(f"{cpu_seconds() - began:.1f}\n")
    if stopped:
        # At once: the worker must not begin what waits in its queue.
        os._exit(130)
    attempts = (folder / "cpu_seconds.txt").read_text().split()
    result |= {
        "name": job.name,
        "cpu_seconds": sum(map(float, attempts)),
        "run": dataclasses.asdict(job),
    }
    with written_whole(folder / "result.json") as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found(folder)


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    return sum(os.times()[:4])
