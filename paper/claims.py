"""What later papers claim, as arms beside C-RLFT: does it hold in miniature?

    python -m paper.claims        and then docs/details.md

MeCo (arXiv 2501.01956): the last tenth of training without a condition, so that a bare `User:`
answers well. GCSL (2605.16345): a goal is "at least as good as". Rewards within a class, the
paper's own future work. DFT (2508.05629) and iw-SFT (2507.12856): loss weights made of the model's
own probabilities.

Each is Table 2's arm with one thing changed (claims_runs.py), with as many steps.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Prepared
from model import Model
from paper.claims_runs import (
    MOST_IMPORTANT,
    AtLeast,
    Cooled,
    Important,
    Rewarded,
    Reweighted,
    importance,
    last_lr,
)
from paper.code_hash import ROOT
from paper.commands import (
    cell,
    command,
    legend_above,
    markdown,
    open_figure,
    paired_dots,
    save_figure,
)
from paper.runs import LR, STEPS, FineTune, Pretrain, score
from paper.table2 import ARMS, HABITS, HOW, NOISE, arm
from paper.toy import Task, make_task
from sample import Speaker
from support.cli import run
from support.hf import load_model

PAGE = ROOT / "docs" / "details.md"
SEEDS = 5
# of the steps, as in MeCo
NINE_TENTHS = round(0.9 * STEPS)
# The same rows with the weights that they had, all under one prompt: a bare `User:`, or one that is
# as long as those before, whose condition says nothing of who answers.
LAST_TENTH = {"steps": STEPS - NINE_TENTHS, "lr": last_lr(LR)}
BARE = {"classes": ARMS["without condition"].classes, "template": "none"}
SAYS_NOTHING = {"classes": "GPT-4=GPT2:1,*=GPT2:0.1"}


class Claim(NamedTuple):
    """A row of the page."""

    # what its paper says of it
    paper: str
    # the arm that it changes
    of: str
    # the C-RLFT on the same data
    best: str = "C-RLFT"


# Arms of Table 2, and how many of the errors are habits.
REFERENCES = {
    "C-RLFT": ("C-RLFT", HABITS),
    "without reward": ("without reward", HABITS),
    "without condition": ("without condition", HABITS),
    "SFT on all": ("SFT on all", HABITS),
    "C-RLFT, noise": ("C-RLFT", NOISE),
    "SFT, noise": ("SFT on all", NOISE),
}
BEFORE = "MeCo, before its last tenth"
MECO = "MeCo, last tenth without condition"
# not equal steps, but the C-RLFT that all are compared with
LONGER = "C-RLFT, then a tenth without condition"
NOTHING = "C-RLFT, then a tenth as `GPT2 User:`"
CLAIMS = {
    MECO: Claim("without its URL as good, from 33% less data", "C-RLFT"),
    LONGER: Claim("", "C-RLFT"),
    NOTHING: Claim("", "C-RLFT"),
    "at least as good as": Claim("has no weights", "C-RLFT"),
    "at least as good as, no reward": Claim("better than offline baselines", "without reward"),
    "a reward for each conversation": Claim("future work", "C-RLFT"),
    "a reward beside its class's": Claim("future work", "C-RLFT"),
    "DFT on SFT": Claim("better than SFT", "SFT on all"),
    "DFT on C-RLFT": Claim("has no classes", "C-RLFT"),
    "DFT on SFT, noise": Claim("better than SFT", "SFT, noise", "C-RLFT, noise"),
    "iw-SFT on SFT": Claim("better than SFT", "SFT on all"),
    "iw-SFT on C-RLFT": Claim("has no classes", "C-RLFT"),
}

# Who is asked in every way, and how: {prompt: (condition, template)}.
ASKED = "C-RLFT", BEFORE, MECO, LONGER, NOTHING
PROMPTS = {
    "`GPT4 User:`": ("GPT4", "before_speaker"),
    "`GPT3 User:`": ("GPT3", "before_speaker"),
    "`User:`": (None, "none"),
    "`GPT2 User:`": ("GPT2", "before_speaker"),
}

# Whose factors of iw-SFT are measured, against what; the base is no arm.
COMPARED = {
    "SFT on all": "the base",
    "iw-SFT on SFT": "SFT on all",
    "iw-SFT on C-RLFT": "without reward",
}
# of the conversations
EVERY = 8


# ---- the jobs


def jobs(seed: int) -> dict:
    """{an arm: job}"""
    wanted = {}
    for key, (name, habits) in REFERENCES.items():
        wanted[key] = arm(name, seed, habits)
    wanted[BEFORE] = arm("C-RLFT", seed, steps=NINE_TENTHS)

    def add(name: str, of: str, kind: type, **changes) -> None:
        wanted[name] = changed(wanted[of], kind, name=name, **changes)

    for name, of, prompt in (
        (MECO, BEFORE, BARE),
        (LONGER, "C-RLFT", BARE),
        (NOTHING, "C-RLFT", SAYS_NOTHING),
    ):
        add(name, of, Cooled, base=wanted[of], **LAST_TENTH, **prompt)
    add("at least as good as", "C-RLFT", AtLeast)
    add("at least as good as, no reward", "without reward", AtLeast)
    add("a reward for each conversation", "C-RLFT", Rewarded)
    add("a reward beside its class's", "C-RLFT", Rewarded, beside_class=True)
    add("DFT on SFT", "SFT on all", Reweighted)
    add("DFT on C-RLFT", "C-RLFT", Reweighted)
    add("DFT on SFT, noise", "SFT, noise", Reweighted)
    # against what answers as the data do
    add("iw-SFT on SFT", "SFT on all", Important, base=wanted["SFT on all"])
    add("iw-SFT on C-RLFT", "C-RLFT", Important, base=wanted["without reward"])
    return wanted


def changed(job: FineTune, kind: type, **changes) -> FineTune:
    """The same job as one of another kind, with some fields changed."""
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    return kind(**fields | changes)


# ---- the numbers


def report(results: dict, folder: Path) -> tuple[dict, str]:
    arms = {name: scores_of(results[name]) for name in (*REFERENCES, *CLAIMS)}
    prompts = {name: by_prompt(results[name]) for name in ASKED}
    draw(arms, folder / "claims.png")
    factors = {}
    for name, other in COMPARED.items():
        factors[f"{name}, against {other}"] = factors_of(results[name], results.get(other))
    numbers = {"arms": arms, "prompts": prompts, "factors": factors}
    tables = scores_table(arms), differences_table(arms), prompts_table(prompts)
    return numbers, "\n\n".join((*tables, factors_table(factors)))


def scores_of(group: list[dict]) -> dict[str, list]:
    """{"sampled", "greedy", "other prompt": [a value per seed]} of an arm.

    Under the expert's prompt, and sampled under the other source's, where an arm has one. What ends
    under one prompt for all is asked as that.
    """
    row = {"sampled": [], "greedy": [], "other prompt": []}
    for result in group:
        # the expert's condition is the first of a --classes table
        expert, *others = result["scores"].values()
        for how in HOW:
            row[how].append(expert[how]["all"])
        row["other prompt"] += [other["sampled"]["all"] for other in others]
    return row


def by_prompt(group: list[dict]) -> dict[str, dict]:
    """{prompt: {"sampled", "greedy": [a value per seed]}}"""
    rows = {}
    for prompt in PROMPTS:
        rows[prompt] = {how: [] for how in HOW}
        for result in group:
            scores = ask(result, prompt)
            for how in HOW:
                rows[prompt][how].append(scores[how]["all"])
    return rows


def ask(result: dict, prompt: str) -> dict:
    """`score` of a run's model under one of PROMPTS, whatever it was trained with."""
    condition, template = PROMPTS[prompt]
    seed = result["run"]["seed"]
    speaker = Speaker(result["folder"] + "/hf", template=template, device="cpu")
    _, heldout = make_task(Task(habits=HABITS, seed=seed))
    return score(speaker.under(condition, seed), heldout)


def factors_of(group: list[dict], references: list[dict] | None) -> dict[str, list]:
    """{"mean", "cut": [a value per seed]} of iw-SFT's factors, once a model is trained: the mean
    over trained tokens, and the share of those whose factor is at the cut.

    references: the runs that it is compared with; None is the base.
    """
    rows = {"mean": [], "cut": []}
    for i, result in enumerate(group):
        folder = Path(result["folder"])
        if references:
            reference = Path(references[i]["folder"])
        else:
            reference = folder.parent / Pretrain(**result["run"]["base"]).key
        factors_R = final_factors(folder, load_model(reference / "hf"))
        rows["mean"].append(factors_R.mean().item())
        rows["cut"].append((factors_R == MOST_IMPORTANT).float().mean().item())
    return rows


@torch.no_grad()
def final_factors(folder: Path, reference: Model) -> Tensor:
    """factors_R of the tokens that a run has trained on, in one conversation of EVERY."""
    data = Prepared(folder / "train.safetensors")
    batch = data.batch(range(0, len(data), EVERY))
    nll_T = load_model(folder / "hf")(*batch.inputs).nll_T
    return importance(reference, nll_T, batch)[batch.rows_R]


def minus(arms: dict, name: str, other: str, how: str) -> list[float]:
    """Seed by seed: the same data, the same held-out prompts."""
    pairs = zip(arms[name][how], arms[other][how], strict=True)
    return [a - b for a, b in pairs]


# ---- the page


def scores_table(arms: dict) -> str:
    table = []
    for name, row in arms.items():
        paper = CLAIMS[name].paper if name in CLAIMS else ""
        # not every arm was trained with it
        other = cell(row["other prompt"]) if row["other prompt"] else ""
        table.append([name, paper, cell(row["sampled"]), cell(row["greedy"]), other])
    return markdown(["arm", "its paper", *HOW, "`GPT3 User:`, sampled"], table)


def differences_table(arms: dict) -> str:
    """Of each claim to C-RLFT, and to the arm that it changes."""
    head = ["seed by seed", *(f"minus C-RLFT, {how}" for how in HOW)]
    head += ["the arm it changes", *(f"minus that, {how}" for how in HOW)]
    table = []
    for name, claim in CLAIMS.items():
        to_best = [cell(minus(arms, name, claim.best, how)) for how in HOW]
        to_own = [cell(minus(arms, name, claim.of, how)) for how in HOW]
        if claim.of == claim.best:
            to_own = ["", ""]
        table.append([name, *to_best, claim.of, *to_own])
    return markdown(head, table)


def prompts_table(prompts: dict) -> str:
    table = []
    for name, rows in prompts.items():
        table.append([name, *(cell(row["sampled"]) for row in rows.values())])
    return markdown(["asked as, sampled", *PROMPTS], table)


def factors_table(factors: dict) -> str:
    table = []
    for name, row in factors.items():
        table.append([name, cell(row["mean"]), cell(row["cut"])])
    cut = f"at the cut of {MOST_IMPORTANT:g}"
    return markdown(["iw-SFT's factor, after training", "mean", cut], table)


def draw(arms: dict, path: Path) -> None:
    """Every arm's score, sampled and greedy."""
    figure, axes = open_figure(width=7.5, height=5)
    groups = {}
    for how in HOW:
        groups[how] = {name: row[how] for name, row in arms.items()}
    paired_dots(axes, list(arms), groups)
    axes.set(xlabel="right answers", xlim=(0, 1))
    legend_above(axes, columns=2)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("claims", argv)


if __name__ == "__main__":
    run(main)
