"""What the paper in miniature is made of: runs of the real code on the toy's task, each made once, whoever asks for it.

    python -m paper            all nine commands: about REPLACED on 2 cores; stop it when you like, the same line goes on
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
import re
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import train
from data import Message, PrepareConfig, parse_args, prepare
from paper.toy import PAPER, Task, answer, make_task, train_tokenizer
from sample import SampleConfig, Speaker

STEPS, EPOCHS = 1660, 10  # the budget: so many steps are 10 epochs of the whole data, to 1%
BATCH_TOKENS, LR = 768, 3e-3  # of every run; all else is train.py's default
TABLE = "GPT-4=GPT4:{},*=GPT3:{}"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t by number of seeds


@dataclass(frozen=True)
class PaperConfig:
    out: str = "out/paper"
    seeds: int | None = None  # default: 5 for table2, 3 for the others
    steps: int | None = None  # shorten every run to so many steps; results then stay in --out
    processes: int = os.cpu_count()
    assets: str = ""  # a folder with real conversations, for paper.seven


def check(config):
    for name, most in (("seeds", max(T_95)), ("steps", 10**6), ("processes", 1024)):
        value = getattr(config, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name} {value} is not from 1 to {most:,}")
    for file in ("conversations/mixed_quality.jsonl", "llama2/tokenizer.model") if config.assets else ():
        if not (Path(config.assets) / file).is_file():
            raise ValueError(f"--assets {config.assets}: no {file} in it")
    return config


# ---- a run -------------------------------------------------------------------------------------------------------------


def fine_tune(folder, rows, classes, template, flags, tokenizer=None, max_len=128):
    """`data.py prepare` and `train.py` on these rows, in folder; returns the prepared file's metadata."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer or folder.parent.parent / "tokenizer.model"
    files = (str(folder / "train.jsonl"),)
    meta = prepare(PrepareConfig(files, str(tokenizer), str(folder / "train.safetensors"), classes, template=template, max_len=max_len))
    flags = {"data": folder / "train.safetensors", "out": folder} | flags
    train.main([str(word) for key, value in flags.items() for word in (f"--{key}", value)])
    return meta


def chat(turns, wrong=None):
    """A conversation in ShareGPT's form; with `wrong`, answers carry weights of their own: 1 a right one, this a wrong one."""
    parts = []
    for words, reply, right in turns:
        weight = {} if wrong is None else {"weight": 1.0 if right else wrong}
        parts += [{"from": "human", "value": words}, {"from": "gpt", "value": reply} | weight]
    return parts


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
        fields |= {"kind": type(self).__name__, "batch_tokens": BATCH_TOKENS}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cost(self):
        """In steps of BATCH_TOKENS, about, before the data is made: for the estimate of time."""
        return self.steps


@dataclass(frozen=True)
class Run(Job):
    """One model: the task's conversations under a --classes table and a template; steps None: EPOCHS epochs."""

    task: Task = Task()
    classes: str = TABLE.format(1, 0.1)
    template: str = "before_speaker"
    wrong: float | None = None  # weight of a wrong answer beside 1 for a right one: a reward for each message, not for its source
    lr: float = LR
    base: str | Job = "toy"  # a preset; or the job whose export is fine-tuned, which perform makes first

    @property
    def cost(self):
        return self.steps or STEPS * self.task.size / Task().size

    def do(self, folder):
        sources, heldout = make_task(self.task)
        rows = [{"model": label, "conversations": chat(turns, self.wrong)} for label, chats in sources.items() for turns in chats]
        budget = {"steps": self.steps} if self.steps else {"epochs": EPOCHS}
        model = self.base if isinstance(self.base, str) else folder.parent / self.base.key / "hf"
        flags = {"model": model, "seed": self.seed, "lr": self.lr, "batch_tokens": BATCH_TOKENS} | budget
        meta = fine_tune(folder, rows, self.classes, self.template, flags)
        steps = train.read_metrics(folder / "metrics.jsonl")[-1]["step"]
        prompts = [c["condition"] for c in meta["classes"] if c["weight"]] if self.template != "none" else [""]
        return {"steps": steps, "scores": {p: score(Speaker(folder / "hf", p or None, seed=self.seed), heldout) for p in prompts}}


def converse(speaker, heldout, temperature):
    """[(skill, whether the answer was right)] of each held-out conversation, the model's own answers standing in it.

    A conversation is over at its first wrong answer: (skill, None) for what would have come. Without that a model that says
    one letter all the time would copy it rightly ever after.
    """
    how = SampleConfig(temperature=temperature, max_new=12, batch=len(heldout))
    chats, right, outcome = [[] for _ in heldout], [None] * len(heldout), [[] for _ in heldout]
    for turn in range(max(map(len, heldout))):
        live = [i for i, words in enumerate(heldout) if turn < len(words) and all(good for _, good in outcome[i])]
        for i in live:
            chats[i].append(Message("user", heldout[i][turn]))
        replies = speaker.answer_all([speaker.ids(chats[i]) for i in live], how) if live else []
        for i, (ids, _) in zip(live, replies):
            skill, *letters = heldout[i][turn].removeprefix("then ").split()
            right[i] = answer(" ".join([skill, *(letters or right[i].split())]))
            chats[i].append(Message("assistant", right[i]))
            outcome[i].append((skill, speaker.text(ids) == right[i]))
    return [done + [(words.split()[1], None) for words in asked[len(done) :]] for done, asked in zip(outcome, heldout)]


def score(speaker, heldout):
    """{"sampled", "greedy": {"all", "by_turn", "by_skill"}}, at temperature 1 and 0.

    all: right answers, of all questions. by_turn, by_skill: of those that were reached without an error.
    """
    result = {}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        outcome = converse(speaker, heldout, temperature)
        mean = lambda rights: sum(map(bool, rights)) / max(1, len(rights))
        reached = lambda answers: mean([right for _, right in answers if right is not None])
        result[how] = {"all": mean([right for turns in outcome for _, right in turns]),
                       "by_turn": [reached([turns[t] for turns in outcome if t < len(turns)]) for t in range(max(map(len, heldout)))],
                       "by_skill": {skill: reached([turn for turns in outcome for turn in turns if turn[0] == skill]) for skill in PAPER}}
    return result


# ---- many runs ---------------------------------------------------------------------------------------------------------


def cpu_seconds():
    """Of this process and the children it has waited for."""
    return sum(os.times()[:4])


def do(run, folder):
    """In a worker: the run's result, from its folder where an earlier call left it there."""
    began, folder = cpu_seconds(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        result = run.do(folder)
    result |= {"name": run.name, "cpu_seconds": round(cpu_seconds() - began, 1), "run": dataclasses.asdict(run)}
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(folder / "result.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def perform(runs, config):
    """{run: result} of all runs, the missing ones made now on config.processes cores, the longest first."""
    bases = [one.base for one in runs if isinstance(getattr(one, "base", None), Job)]
    done = perform(bases, config) if bases else {}
    folder = {run: Path(config.out) / "runs" / run.key for run in runs}
    done |= {run: json.loads((f / "result.json").read_text()) | {"folder": str(f)} for run, f in folder.items() if (f / "result.json").is_file()}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the same numbers on a machine with a GPU; one thread a process
    todo = sorted((run for run in folder if run not in done), key=lambda run: -run.cost)
    if not todo:
        return done
    print(f"{len(folder)} runs, {len(done)} of them there, {len(todo)} to make on {config.processes} cores", flush=True)
    tokenizer = Path(config.out) / "tokenizer.model"
    if not tokenizer.is_file():
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        texts = [{"value": part} for rows in make_task(Task())[0].values() for turns in rows for words, reply, _ in turns for part in (words, reply)]
        train_tokenizer([{"conversations": texts}], tokenizer, ("GPT4", "GPT3", "GPT2"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.processes, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(do, run, str(folder[run])): run for run in todo}
        try:
            for k, future in enumerate(as_completed(futures), 1):
                run, result = futures[future], future.result()
                done[run] = result | {"folder": str(folder[run])}
                rate = sum(r["cpu_seconds"] for r in done.values()) / sum(run.cost for run in done)
                left = rate * sum(run.cost for run in todo if run not in done) / config.processes
                print(f"[{k}/{len(todo)}] {run.name}, seed {run.seed}: {result['cpu_seconds']:.0f} s of CPU; about {left / 60:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


# ---- results -----------------------------------------------------------------------------------------------------------


def interval(values):
    """(mean, half width of its 95% interval by Student's t), None for the width of a single value."""
    values = list(values)
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
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
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the figures need matplotlib: `pip install matplotlib`, then the same line; no run is made again") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    fig, axes = pyplot.subplots(*shape, figsize=(width, height))
    draw(axes)
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(fig)
    print(f"wrote {path}")


def publish(name, config, seeds, results, table, cpu):
    """Write <name>.json, with what it was made with, and put the table where a README has its mark; with --steps into --out only."""
    place = place_of(config)
    content = {"command": f"python -m paper.{name}", "seeds": seeds, "steps": config.steps or STEPS, "cpu_seconds": cpu,
               "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}, "results": results, "table": table}
    (place / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{table}\n", flush=True)
    for page in (Path("paper/README.md"), Path("README.md")) if not config.steps else ():
        text = page.read_text()
        page.write_text(re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S))


# ---- commands ----------------------------------------------------------------------------------------------------------


def place_of(config):
    place = Path(config.out) / "short" if config.steps else Path("results/paper")
    place.mkdir(parents=True, exist_ok=True)
    return place


def runs_of(module, config):
    """{key: [its Run for each seed]} of a command's module."""
    wanted = {}
    for seed in range(config.seeds or module.SEEDS):
        for key, one in module.runs(seed).items():
            if isinstance(getattr(one, "base", None), Job) and config.steps:
                one = dataclasses.replace(one, base=dataclasses.replace(one.base, steps=config.steps))
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
            print(f"{name}: left out; --assets DIR names a folder with conversations/mixed_quality.jsonl and llama2/tokenizer.model")
            return 0
        wanted = runs_of(module, config)
        done = perform([one for group in wanted.values() for one in group], config)
        torch.set_num_threads(1)
        began = cpu_seconds()
        results, table = module.report({key: [done[one] for one in group] for key, group in wanted.items()}, place_of(config))
        cpu = {"runs": round(sum(result["cpu_seconds"] for result in done.values()), 1), "analysis": round(cpu_seconds() - began, 1)}
        publish(name, config, config.seeds or module.SEEDS, results, table, cpu)
        return cpu["analysis"]

    return main
