"""What the paper in miniature is made of: runs of the real code on the toy's task, each made once, whoever asks for it.

    python -m paper            all nine commands: about 37 minutes on 2 cores; stop it when you like, the same line goes on
    python -m paper.table2     one of them; --seeds N, --steps N (shorter runs, into out/paper only), --processes N

A `Run` is data, a `--classes` table, a template, a budget and a seed; it goes through `data.prepare`, `train.main` and
`sample.Speaker`, as a user's would. Its folder out/paper/runs/<hash of all that> holds what train.py leaves, and result.json
once it is scored. One thread a process, one process a core; CPU time is what the processes used, summed.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from conversations import Message
from data import PrepareConfig, Prepared, prepare
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
from support.cli import parse_args
from support.metrics import read_metrics
from train import main as train

ROOT = Path(__file__).parents[1]
SECONDS = 0.037  # of CPU for a step, as a first guess at the time a run takes
VERSION = 1  # in the name of every run: raise it with a change of the code that changes results
STEPS, EPOCHS = 830, 5  # the budget: so many steps are 5 epochs of the whole data, to 1%
BATCH_TOKENS, LR = 768, 2e-3  # of every run; all else is train.py's default
BASE_STEPS, BASE_LR = 2490, 3e-3  # from random weights
TABLE = "GPT-4=GPT4:{},*=GPT3:{}"
# Student's t by number of seeds
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class PaperConfig:
    out: str = "out/paper"
    seeds: int | None = None  # default: 5 for table2, 3 for the others
    # shorten every run to so many steps; with this or --seeds results stay in --out
    steps: int | None = None
    processes: int = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    assets: str = ""  # a folder with real conversations, for paper.seven


def check(config):
    for name, most in (("seeds", max(T_95)), ("steps", 10**6), ("processes", 1024)):
        value = getattr(config, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name} {value} is not from 1 to {most:,}")
    for file in (
        ("conversations/mixed_quality.jsonl", "llama2/tokenizer.model") if config.assets else ()
    ):
        if not (Path(config.assets) / file).is_file():
            raise ValueError(f"--assets {config.assets}: no {file} in it")
    try:
        import matplotlib  # noqa: F401, before any run is made
    except ImportError:
        raise ValueError("the figures need matplotlib: `pip install matplotlib`") from None
    return config


# ---- a run


def prepared(path, rows, classes, tokenizer, template="before_speaker", max_len=128):
    """The Prepared of these rows: `data.py prepare`, with path as --out and the rows beside it."""
    rows_file = path.with_suffix(".jsonl")
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        PrepareConfig(
            (str(rows_file),),
            str(tokenizer),
            str(path),
            classes,
            template=template,
            max_len=max_len,
            processes=1,
        )
    )
    return Prepared(path)


def fine_tune(folder, rows, classes, template, flags, tokenizer=None, max_len=128):
    """`train.py` on these rows, in folder, with the flags that are given; returns the prepared file's metadata."""
    data = prepared(
        folder / "train.safetensors",
        rows,
        classes,
        tokenizer or folder.parent.parent / "tokenizer.model",
        template,
        max_len,
    )
    flags = {"data": data.path, "out": folder} | flags
    train([str(word) for key, value in flags.items() for word in (f"--{key}", value)])
    return data.meta


def sharegpt(turns, label="", wrong=None):
    """A conversation in ShareGPT's form; with `wrong`, answers carry weights of their own: 1 a right one, this a wrong one."""
    parts = []
    for words, reply, right in turns:
        weight = {} if wrong is None else {"weight": 1.0 if right else wrong}
        parts += [{"from": "human", "value": words}, {"from": "gpt", "value": reply} | weight]
    return {"model": label, "conversations": parts}


@dataclass(frozen=True)
class Job:
    """What `perform` makes once: `do(folder)` returns its result, for JSON; key tells it from all others."""

    name: str = field(compare=False)  # for the progress line
    seed: int = 0
    steps: int | None = STEPS
    assets: str = field(default="", compare=False)

    @property
    def key(self):
        counts = {f.name for f in dataclasses.fields(self) if f.compare}
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key in counts}
        fields |= {
            "kind": type(self).__name__,
            "version": VERSION,
            "batch_tokens": BATCH_TOKENS,
            "epochs": EPOCHS,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cost(self):
        """In steps of BATCH_TOKENS, about, before the data is made: for the estimate of time."""
        return self.steps


@dataclass(frozen=True)
class Pretrain(Job):
    """The base model: 13,200 lines like `reverse a c b d : d b c a then shift : e c d b`, right 4 times in 10, without classes or weights.

    It knows the skills, then, as well as the other source does. data.py has no way to train on bare text: a line stands behind `Assistant:`,
    which is no arm's prompt, and ends with `<|end_of_turn|>`. No line begins with a prompt that is held out for any seed.
    """

    steps: int = BASE_STEPS

    def do(self, folder):
        rng, rows = random.Random("base"), []
        held_out = {
            asked[0] for seed in range(max(T_95)) for asked in make_task(Task(seed=seed))[1]
        }
        while len(rows) < 13_200:
            turns = make_conversation(rng, 0.4, [1, 1, 1])
            if turns[0][0] not in held_out:
                text = " ".join(f"{words} : {reply}" for words, reply, _ in turns)
                rows.append({"conversations": [{"from": "gpt", "value": text}]})
        fine_tune(
            folder,
            rows,
            "*=text:1",
            "none",
            {
                "model": "toy",
                "seed": self.seed,
                "steps": self.steps,
                "lr": BASE_LR,
                "batch_tokens": BATCH_TOKENS,
            },
        )
        return {}


@dataclass(frozen=True)
class Run(Job):
    """One model: the task's conversations under a --classes table and a template; steps None: EPOCHS epochs."""

    task: Task = Task()
    classes: str = TABLE.format(1, 0.1)
    template: str = "before_speaker"
    # weight of a wrong answer beside 1 for a right one: a reward for each message, not for its
    # source
    wrong: float | None = None
    lr: float = LR
    # what is fine-tuned, made first; or a preset, for random weights
    base: str | Job = Pretrain("pre-training")

    @property
    def cost(self):
        return self.steps or STEPS * self.task.size / Task().size

    def do(self, folder):
        sources, heldout = make_task(self.task)
        rows = [
            sharegpt(turns, label, self.wrong)
            for label, chats in sources.items()
            for turns in chats
        ]
        budget = {"steps": self.steps} if self.steps else {"epochs": EPOCHS}
        model = self.base if isinstance(self.base, str) else folder.parent / self.base.key / "hf"
        flags = {
            "model": model,
            "seed": self.seed,
            "lr": self.lr,
            "batch_tokens": BATCH_TOKENS,
        } | budget
        meta = fine_tune(folder, rows, self.classes, self.template, flags)
        steps = read_metrics(folder / "metrics.jsonl")[-1]["step"]
        prompts = dict.fromkeys(c["condition"] for c in meta["classes"] if c["weight"])
        trained = {
            question
            for chats in sources.values()
            for turns in chats
            for question in full_questions(*zip(*(turn[:2] for turn in turns)))
        }
        return {
            "steps": steps,
            "scores": {
                p: score(Speaker(folder / "hf", p, device="cpu", seed=self.seed), heldout, trained)
                for p in prompts
            },
        }


def converse(speaker, heldout, temperature):
    """[[whether the answer was right]] of each held-out conversation, turn by turn, what came before being right.

    Up to its first error a conversation is the model's own. There the right answer is put in, so that later turns are asked of all.
    """
    how = SampleConfig(temperature=temperature, max_new=12, batch=len(heldout))
    chats, outcome = [[] for _ in heldout], [[] for _ in heldout]
    for turn in range(max(map(len, heldout))):
        live = [i for i, asked in enumerate(heldout) if turn < len(asked)]
        for i in live:
            chats[i].append(Message("user", heldout[i][turn]))
        replies = speaker.answer_all([speaker.ids(chats[i]) for i in live], how)
        for i, (ids, _) in zip(live, replies):
            right = solve(heldout[i])[turn]
            chats[i].append(Message("assistant", right))
            outcome[i].append(speaker.text(ids) == right)
    return outcome


def share(rights):
    rights = list(rights)
    return sum(rights) / max(1, len(rights))


def unbroken(outcome):
    """The share of all questions that were answered right in a conversation without an error before: the score of an arm."""
    return share(all(turns[: t + 1]) for turns in outcome for t in range(len(turns)))


def score(speaker, heldout, trained=frozenset()):
    """{"sampled", "greedy": {"all", "by_turn", "by_skill", "unseen"}}, at temperature 1 and 0.

    all: `unbroken`. The others are shares of right answers where what came before is right: by turn, by skill, and of the questions
    (skill and letters) that stand nowhere in `trained`, neither as a first question nor as a follow-up.
    """
    result, questions = {}, [full_questions(asked, solve(asked)) for asked in heldout]
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        outcome = converse(speaker, heldout, temperature)
        answers = [
            (t, q, right)
            for turns, asked in zip(outcome, questions)
            for t, (right, q) in enumerate(zip(turns, asked))
        ]
        result[how] = {
            "all": unbroken(outcome),
            "by_turn": [
                share(r for t, _, r in answers if t == turn)
                for turn in range(max(map(len, heldout)))
            ],
            "by_skill": {
                skill: share(r for _, q, r in answers if q.startswith(skill)) for skill in PAPER
            },
            "unseen": share(r for _, q, r in answers if q not in trained),
        }
    return result


# ---- many runs


def cpu_seconds():
    """Of this process and the children it has waited for."""
    return sum(os.times()[:4])


def start_worker():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on a machine with a GPU
    torch.set_num_threads(1)


def do(run, folder):
    """In a worker: the run's result, also written to its folder. CPU time is that of all attempts."""
    began, folder = cpu_seconds(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "log.txt", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        stopped = False
        try:
            result = run.do(folder)
        except SystemExit:
            # train.py has saved after a signal; the worker must not begin what waits in its queue
            stopped = True
        finally:
            with open(folder / "cpu_seconds.txt", "a") as file:
                file.write(f"{cpu_seconds() - began:.1f}\n")
        if stopped:
            os._exit(130)
    result |= {
        "name": run.name,
        "cpu_seconds": sum(map(float, (folder / "cpu_seconds.txt").read_text().split())),
        "run": dataclasses.asdict(run),
    }
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(folder / "result.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def found(folder):
    """The result in a run's folder, None where there is none, or half of one."""
    try:
        return json.loads((folder / "result.json").read_text()) | {"folder": str(folder)}
    except (OSError, ValueError):
        return None


def perform(runs, config):
    """{run: result} of all runs, the missing ones made now on config.processes cores, the longest first."""
    bases = [one.base for one in runs if isinstance(getattr(one, "base", None), Job)]
    done = perform(bases, config) if bases else {}
    folder = {run: Path(config.out) / "runs" / run.key for run in runs}
    done |= {run: result for run, f in folder.items() if (result := found(f))}
    todo = sorted((run for run in folder if run not in done), key=lambda run: -run.cost)
    if not todo:
        return done
    print(
        f"{len(folder)} runs, {len(folder) - len(todo)} of them there, {len(todo)} to make on {config.processes} cores, about "
        f"{sum(run.cost for run in todo) * SECONDS / config.processes / 60:.0f} min",
        flush=True,
    )
    tokenizer = Path(config.out) / "tokenizer.model"
    if not tokenizer.is_file():
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(
            [sharegpt(turns) for chats in make_task(Task())[0].values() for turns in chats],
            tokenizer,
            ("GPT4", "GPT3", "GPT2"),
        )
    # as Ctrl-C: no worker is left behind
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = ProcessPoolExecutor(config.processes, multiprocessing.get_context("spawn"), start_worker)
    try:
        futures = {pool.submit(do, run, str(folder[run])): run for run in todo}
        made, used = 0.0, 0.0
        for k, future in enumerate(as_completed(futures), 1):
            run, result = futures[future], future.result()
            done[run], made, used = (
                result | {"folder": str(folder[run])},
                made + run.cost,
                used + result["cpu_seconds"],
            )
            left = used / made * (sum(run.cost for run in todo) - made) / config.processes
            print(
                f"[{k}/{len(todo)}] {run.name}, seed {run.seed}: {result['cpu_seconds']:.0f} s of CPU; about {left / 60:.0f} min left",
                flush=True,
            )
    except BaseException as error:
        # Ctrl-C, a full disk: what runs now saves and leaves, what waits does not begin
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                f"a worker was killed (memory?); the same line goes on, with --processes {max(1, config.processes // 2)} on half the memory"
            ) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    pool.shutdown()
    return done


# ---- results


def interval(values):
    """(mean, half width of its 95% interval by Student's t), None for the width of a single value."""
    values = list(values)
    half = (
        T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        if len(values) > 1
        else None
    )
    return statistics.fmean(values), half


def cell(values, digits=3):
    """`0.812 +- 0.034` of a value per seed."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" +- {half:.{digits}f}" if half is not None else "")


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(path, draw, width=6.4, height=4.0, shape=(1, 1)):
    """draw(axes), an array of them if shape is not (1, 1), saved as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(*shape, figsize=(width, height))
    draw(axes)
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(fig)
    print(f"wrote {path}")


def bars(axes, labels, groups, size=8):
    """Bars with intervals: groups {legend: [values per label, () for none]}."""
    width = 0.8 / len(groups)
    for k, (legend, rows) in enumerate(groups.items()):
        heights = [(i + k * width, *interval(values)) for i, values in enumerate(rows) if values]
        x, means, halves = zip(*heights)
        axes.bar(
            x, means, 0.92 * width, yerr=[half or 0 for half in halves], capsize=2, label=legend
        )
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(labels))],
        [label.replace(" ", "\n") for label in labels],
        fontsize=size,
    )
    axes.set_ylim(0, None)
    axes.legend(fontsize=7)


def lines(axes, x, groups):
    """Lines with intervals: groups {legend: [values per x]}."""
    for legend, rows in groups.items():
        means, halves = zip(*map(interval, rows))
        axes.errorbar(x, means, [half or 0 for half in halves], marker="o", capsize=3, label=legend)
    axes.legend(fontsize=7)


def publish(name, config, seeds, results, table, cpu):
    """Write <name>.json, with what it was made with, and put the table where a README has its mark; shortened runs go to --out only."""
    content = {
        "command": f"python -m paper.{name}",
        "seeds": seeds,
        "cpu_seconds": cpu,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "results": results,
        "table": table,
    }
    (place_of(config) / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{table}\n", flush=True)
    for page in (ROOT / "paper" / "README.md", ROOT / "README.md") if whole(config) else ():
        text = page.read_text()
        page.write_text(
            re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                lambda m: f"{m[1]}{table}\n{m[2]}",
                text,
                flags=re.S,
            )
        )


# ---- commands


def whole(config):
    return config.steps is None and config.seeds is None


def place_of(config):
    """Of JSON and PNG: the repository's results for whole runs, else --out."""
    place = ROOT / "results" / "paper" if whole(config) else Path(config.out) / "short"
    place.mkdir(parents=True, exist_ok=True)
    return place


def runs_of(module, config):
    """{key: [its Run for each seed]} of a command's module."""
    wanted = {}
    for seed in range(config.seeds or module.SEEDS):
        for key, one in module.runs(seed).items():
            if isinstance(getattr(one, "base", None), Job) and config.steps:
                one = dataclasses.replace(
                    one, base=dataclasses.replace(one.base, steps=config.steps)
                )
            steps = min(config.steps, one.steps or config.steps) if config.steps else one.steps
            one = dataclasses.replace(one, steps=steps, assets=config.assets)
            wanted.setdefault(key, []).append(one)
    return wanted


def command(name):
    """The main of `python -m paper.<name>`. Its module has SEEDS, runs(seed) -> {key: Run}, report({key: [result]}, folder) -> (json, table)."""

    def main(argv):
        config = check(parse_args(PaperConfig, argv))
        module = importlib.import_module(f"paper.{name}")
        if getattr(module, "NEEDS_ASSETS", False) and not config.assets:
            print(
                f"{name}: left out; --assets DIR names a folder with conversations/mixed_quality.jsonl and llama2/tokenizer.model"
            )
            return 0
        wanted = runs_of(module, config)
        done = perform([one for group in wanted.values() for one in group], config)
        torch.set_num_threads(1)
        began = cpu_seconds()
        results, table = module.report(
            {key: [done[one] for one in group] for key, group in wanted.items()}, place_of(config)
        )
        cpu = {
            "runs": round(sum(result["cpu_seconds"] for result in done.values()), 1),
            "analysis": round(cpu_seconds() - began, 1),
        }
        publish(name, config, config.seeds or module.SEEDS, results, table, cpu)
        return cpu["analysis"]

    return main
