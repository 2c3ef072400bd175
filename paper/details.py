"""Each detail of C-RLFT, and what it is worth here: the arm with theirs beside the arm with ours.

    python -m paper.details

The page is docs/details.md. All arms are Table 2's C-RLFT, on the task whose errors are habits,
with one thing changed:

    what data can say     other rows, another `--classes` table, another flag
    what they cannot      a function of this file takes the place of one of train.py's rooms while
                          the run is made, in the run's own process (`Variant`)

A run's key has the source of what its own change needs of this file, and not of the rest
(`Changed.code`): a changed row of the page, or another arm, throws no run away.

From top to bottom: the kinds of arms, changes of the rows, functions that take another's place, the
new token's row, the jobs, the page.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from data import Prepared
from packing import Batch, flat
from paper.code_hash import ROOT, without_docstrings
from paper.commands import cell, command, interval, markdown
from paper.runs import BATCH_TOKENS, LR, STEPS, TABLE, FineTune, base_of, code_of, sharegpt
from paper.table2 import HABITS, HOW, arm, expert_score, scarce
from paper.toy import Task
from recipe import TrainConfig, epoch_steps
from support.budget import train_flops
from support.cli import run
from support.export import save_shard, write_manifest
from support.hf import read_config

PAGE = ROOT / "docs" / "details.md"

SEEDS = 3


# ---- the kinds of arms

# as it was loaded: the file may change while the command runs
SOURCE = Path(__file__).read_text()


class Definition(NamedTuple):
    """A statement at the top of a file: its syntax tree as text, and all names in it."""

    text: str
    uses: set[str]


@functools.cache
def definitions(source: str) -> dict[str, Definition]:
    """{name: its Definition}, of all names that a file defines, without docstrings."""
    found = {}
    for statement in without_docstrings(ast.parse(source)).body:
        uses = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        definition = Definition(ast.dump(statement), uses)
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = definition
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                found[target.id] = definition
    return found


def needed_by(names: tuple[str, ...]) -> dict[str, Definition]:
    """The definitions of these names, and of all names of this file that they use."""
    defined = definitions(SOURCE)
    needed = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in defined and name not in needed:
            needed[name] = defined[name]
            waiting += defined[name].uses
    return needed


@dataclass(frozen=True)
class Changed(FineTune):
    """An arm with a change that this file makes: here, other flags of train.py."""

    # ((flag, value), ..)
    more_flags: tuple = ()

    @property
    def code(self) -> str:
        """That of every arm, and of this file what the change needs."""
        needed = needed_by(self.names)
        digest = hashlib.sha256(code_of(FineTune).encode())
        for name in sorted(needed):
            digest.update(f"{name}\0{needed[name].text}\0".encode())
        return digest.hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Of this file's definitions, those that make the change."""
        return (type(self).__name__,)

    @property
    def cost(self) -> float:
        batch_tokens = dict(self.more_flags).get("batch_tokens", BATCH_TOKENS)
        return super().cost * batch_tokens / BATCH_TOKENS

    def flags(self, folder: Path) -> dict:
        return super().flags(folder) | dict(self.more_flags)


# {name of a function of this file: (room, name of the function whose place it takes, itself)}
VARIANTS = {}


def in_place_of(room: str, name: str) -> Callable:
    """Above a function of this file: it is called instead of `name`, where `room` looks that up.

    Its first argument is ours, the function whose place it takes; the others are ours's.
    """

    def keep(function: Callable) -> Callable:
        VARIANTS[function.__name__] = room, name, function
        return function

    return keep


@contextlib.contextmanager
def replaced(variant: str) -> Iterator[None]:
    """For `with`: a function of train.py's rooms is another one; afterwards it is ours again."""
    room, name, function = VARIANTS[variant]
    module = importlib.import_module(room)
    ours = getattr(module, name)
    setattr(module, name, functools.partial(function, ours))
    try:
        yield
    finally:
        setattr(module, name, ours)


@dataclass(frozen=True)
class Variant(Changed):
    """An arm that is trained with a function of this file in place of one of train.py's rooms."""

    # the function's name; its source is in the key
    variant: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (*super().names, self.variant)

    def do(self, folder: Path) -> dict:
        # Around the score, too, which calls none of these functions: the rooms that are touched
        # are not sample.py's.
        with replaced(self.variant):
            return super().do(folder)


# ---- changes of the rows

# TABLE.format(1, 0.1), by label
WEIGHT_OF = {"GPT-4": 1.0, "GPT-3.5": 0.1}


@dataclass(frozen=True)
class UserTrained(Changed):
    """What the user says has its conversation's weight, as the answers have."""

    def rows(self, sources: dict[str, list]) -> list[dict]:
        rows = super().rows(sources)
        for row in rows:
            for message in row["conversations"][::2]:
                message["weight"] = WEIGHT_OF[row["model"]]
        return rows


@dataclass(frozen=True)
class DividedByZ(Changed):
    """A reward of the answer, and its weight divided by Z(x, c): the first line of Eq. 6.

    Z(x, c) is the mean of exp(r / beta) over what class c answers to x. Here it is the mean weight
    of the class's answers to questions of the same skill.
    """

    def rows(self, sources: dict[str, list]) -> list[dict]:
        rows = []
        for label, chats in sources.items():
            z = mean_weights(chats, self.wrong)
            for turns in chats:
                row = sharegpt(turns, label, self.wrong)
                for (words, _, _), answer in zip(turns, row["conversations"][1::2]):
                    answer["weight"] /= z[skill_of(words)]
                rows.append(row)
        return rows


def skill_of(words: str) -> str:
    return words.removeprefix("then ").split()[0]


def mean_weights(chats: list[list[tuple]], wrong: float) -> dict[str, float]:
    """{skill: the mean weight of a source's answers to it}, 1 for a right answer."""
    weights_of = {}
    for turns in chats:
        for words, _, right in turns:
            weights_of.setdefault(skill_of(words), []).append(1.0 if right else wrong)
    return {skill: sum(weights) / len(weights) for skill, weights in weights_of.items()}


# ---- functions that take another's place: what has a weight


@in_place_of("conversations", "tokenize")
def no_end_of_turn(ours, conversation, tokenizer, template):
    """The token that ends a turn weighs 0: the model is never asked to predict it."""
    tokens, weights = ours(conversation, tokenizer, template)
    weights[tokens == tokenizer.eot] = 0
    return tokens, weights


@in_place_of("conversations", "tokenize")
def whole_text(ours, conversation, tokenizer, template):
    """Every token has its conversation's weight: prefixes and what the user says, too."""
    tokens, weights = ours(conversation, tokenizer, template)
    # the first token is predicted from nothing
    weights[1:] = weights.max()
    return tokens, weights


# ---- functions that take another's place: what the loss is divided by
#
# train_step divides a step's sum of w * nll by the step's sum of w. Another way to divide is the
# same with other weights, which have the same sum: so these multiply the weights of a step.


def multiplied(batch: Batch, factors: np.ndarray) -> Batch:
    """The batch with its weights times a factor for each conversation."""
    factors_N = torch.from_numpy(factors.astype(np.float32))
    lengths_N = batch.cu_seqlens.diff()
    weights_T = batch.weights_T * factors_N.repeat_interleave(lengths_N)
    return dataclasses.replace(batch, weights_T=weights_T)


@in_place_of("train", "my_batches")
def by_micro_batch(ours, data, steps, me, world):
    """Each micro-batch is divided by its own sum of weights; of these means the mean is taken, by
    the numbers of supervised tokens."""
    for step in steps:
        of_step = flat([step])
        tokens_per_weight = data.supervised[of_step].sum() / data.weight_sums[of_step].sum()
        for micro, batch in zip(step, ours(data, [step], me, world)):
            mine = data.supervised[micro].sum() / data.weight_sums[micro].sum()
            yield multiplied(batch, np.full(len(micro), mine / tokens_per_weight))


@in_place_of("train", "my_batches")
def one_conversation_a_micro_batch(ours, data, steps, me, world):
    """The same where each micro-batch is one conversation, computed in ours."""
    for step in steps:
        of_step = flat([step])
        tokens_per_weight = data.supervised[of_step].sum() / data.weight_sums[of_step].sum()
        for micro, batch in zip(step, ours(data, [step], me, world)):
            mine = data.supervised[micro] / data.weight_sums[micro]
            yield multiplied(batch, mine / tokens_per_weight)


@in_place_of("train", "my_batches")
def by_length(ours, data, steps, me, world):
    """A conversation's loss is the mean of its tokens', and counts with its class's weight."""
    for step in steps:
        of_step = flat([step])
        weight_sum = data.weight_sums[of_step].sum()
        mean_weights_sum = (data.weight_sums[of_step] / data.supervised[of_step]).sum()
        for micro, batch in zip(step, ours(data, [step], me, world)):
            factors = weight_sum / mean_weights_sum / data.supervised[micro]
            yield multiplied(batch, factors)


RANKS = 8


@in_place_of("train", "train_step")
def divided_by_ranks(ours, model, optimizer, batches, device, weight_sum, *rest):
    """The gradient is divided by the number of ranks once more; so is what clipping sees."""
    return ours(model, optimizer, batches, device, RANKS * weight_sum, *rest)


# ---- functions that take another's place: what a step holds


@in_place_of("packing", "deal")
def classes_by_chance(ours, problem, groups):
    """Conversations are dealt to the steps by their lengths, whatever class they are of."""
    one_class = np.zeros_like(problem.class_ids)
    return ours(dataclasses.replace(problem, class_ids=one_class), groups)


@in_place_of("recipe", "epoch_steps")
def last_step_dropped(ours, *args):
    """The last step of an epoch is left out."""
    return ours(*args)[:-1]


# ---- functions that take another's place: what a token sees


def joined(ours: Callable, conversations: list, class_ids: np.ndarray) -> Batch:
    """A micro-batch whose conversations are one to attention: all look back at all before.

    They are shuffled: as they are planned, the expert's would be the first of each micro-batch, and
    would see nothing of the others.
    """
    lengths = [len(tokens) for tokens, _ in conversations]
    order = np.random.default_rng(lengths).permutation(len(conversations))
    batch = ours([conversations[i] for i in order], class_ids[order])
    tokens = sum(lengths)
    whole = torch.tensor([0, tokens], dtype=torch.int32)
    return dataclasses.replace(batch, cu_seqlens=whole, max_seqlen=tokens)


@in_place_of("data", "pack")
def leaking(ours, conversations, class_ids):
    """Attention crosses from a conversation into the next; positions begin again in each."""
    return joined(ours, conversations, class_ids)


@in_place_of("data", "pack")
def leaking_in_one_row(ours, conversations, class_ids):
    """Attention crosses, and positions run on: a row of text that happens to be conversations."""
    batch = joined(ours, conversations, class_ids)
    return dataclasses.replace(batch, positions_T=torch.arange(len(batch.tokens_T)))


# ---- the new token's row

# of transformers' random initialization, and of support/hf.py's RandomWeights
ROW_STD = 0.02


@dataclass(frozen=True)
class NewRow(Changed):
    """A base that has forgotten `<|end_of_turn|>`: its rows of embedding and head are new."""

    # mean, random or zero
    row: str = ""

    def do(self, folder: Path) -> dict:
        write_with_new_row(
            super().flags(folder)["model"], self.base_in(folder), self.row, self.seed
        )
        result = super().do(folder)
        shutil.rmtree(self.base_in(folder))
        return result

    def flags(self, folder: Path) -> dict:
        return super().flags(folder) | {"model": self.base_in(folder)}

    @staticmethod
    def base_in(folder: Path) -> Path:
        return folder / "base"


def write_with_new_row(base: Path, folder: Path, row: str, seed: int) -> None:
    """A copy of the base's directory, in which two rows are new."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    token = json.loads((base / "crlft.json").read_text())["eot"]
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name][token] = new_row(tensors[name], token, row, f"{seed} {name}")
        save_shard(tensors, file)
    write_manifest(folder)


def new_row(matrix_VD: torch.Tensor, token: int, row: str, seed: str) -> torch.Tensor:
    """What the token's row begins as; the tokens before it are those of pre-training."""
    if row == "mean":
        return matrix_VD[:token].double().mean(0).float()
    if row == "zero":
        return torch.zeros_like(matrix_VD[token])
    assert row == "random", row
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return ROW_STD * torch.randn(matrix_VD.shape[1], generator=generator)


# ---- the jobs


def c_rlft(kind: type, name: str, seed: int, **fields) -> Changed:
    """Table 2's C-RLFT with a change."""
    task = Task(habits=HABITS, seed=seed)
    return kind(name, seed, task=task, base=base_of(HABITS), **fields)


def with_function(function: Callable, seed: int, **fields) -> Variant:
    name = function.__name__
    return c_rlft(Variant, name, seed, variant=name, **fields)


def with_batch(share: float, lr: float, seed: int) -> Changed:
    """So many times the tokens a step, in as many steps as make the same epochs."""
    name = f"{share:g} of the batch, lr {lr:g}"
    flags = (("batch_tokens", round(share * BATCH_TOKENS)),)
    return c_rlft(Changed, name, seed, steps=round(STEPS / share), lr=lr, more_flags=flags)


QUARTER = 1 / 4
FOUR = 4
# a step is four of these
MICRO = (("micro_tokens", BATCH_TOKENS // 4),)
# 0.1 in bf16
BF16 = TABLE.format(1, torch.tensor(0.1, dtype=torch.bfloat16).item())


def jobs(seed: int) -> dict:
    """{arm: job}"""
    wanted = {
        "ours": arm("C-RLFT", seed, HABITS),
        "no end of turn": with_function(no_end_of_turn, seed),
        "user trained": c_rlft(UserTrained, "user trained", seed),
        "whole text": with_function(whole_text, seed),
        "10 and 1": arm("C-RLFT", seed, HABITS, classes=TABLE.format(10, 1)),
        "bf16 weights": arm("C-RLFT", seed, HABITS, classes=BF16),
        # of Fig. 7
        "before_assistant": arm("C-RLFT", seed, HABITS, steps=None, template="before_assistant"),
        "beginning": arm("C-RLFT", seed, HABITS, steps=None, template="beginning"),
        "reward of the answer": arm("C-RLFT", seed, HABITS, wrong=0.1),
        "divided by Z": c_rlft(DividedByZ, "divided by Z", seed, wrong=0.1),
        "four micro-batches": c_rlft(Changed, "four micro-batches", seed, more_flags=MICRO),
        "by micro-batch": with_function(by_micro_batch, seed, more_flags=MICRO),
        "one conversation": with_function(one_conversation_a_micro_batch, seed),
        "by length": with_function(by_length, seed),
        "by ranks": with_function(divided_by_ranks, seed),
        "by chance": with_function(classes_by_chance, seed),
        "last step": with_function(last_step_dropped, seed),
        "leaking": with_function(leaking, seed),
        "one row": with_function(leaking_in_one_row, seed),
    }
    for row in ("mean", "random", "zero"):
        wanted[f"{row} row"] = c_rlft(NewRow, f"{row} row", seed, row=row)
    for share, name in ((QUARTER, "quarter"), (FOUR, "four times")):
        wanted[name] = with_batch(share, LR * math.sqrt(share), seed)
        wanted[f"{name}, same lr"] = with_batch(share, LR, seed)
    return wanted


# ---- the page


class Detail(NamedTuple):
    """A row: what ours does and what others do, in words, and an arm of either."""

    # what makes their arm: a function or class of this file, or flags
    made_by: str
    theirs: str
    ours: str
    their_arm: str
    our_arm: str = "ours"


# OpenChat is the public trainer of 2023.
DETAILS = {
    "the end of turn": Detail(
        made_by="`no_end_of_turn`",
        theirs="weight 0: transformers' collator where it is the padding's token, too",
        ours="weighs as its answer; so in OpenChat",
        their_arm="no end of turn",
    ),
    "the user's text": Detail(
        made_by="`UserTrained`",
        theirs="trained on, where the user's message has a weight (OpenChat takes it)",
        ours="weight 0; a message's own is taken",
        their_arm="user trained",
    ),
    "the whole text": Detail(
        made_by="`whole_text`",
        theirs="trained on, prefixes too: TRL's default",
        ours="answers only; so in OpenChat",
        their_arm="whole text",
    ),
    "a common factor": Detail(
        made_by="`--classes GPT-4=GPT4:10,*=GPT3:1`",
        theirs="weights 10 and 1",
        ours="1 and 0.1; so in OpenChat",
        their_arm="10 and 1",
    ),
    "bf16 weights": Detail(
        made_by=f"`--classes {BF16}`",
        theirs="OpenChat: 0.1 is 0.1001",
        ours="fp32",
        their_arm="bf16 weights",
    ),
    "1/Z of Eq. 6": Detail(
        made_by="`DividedByZ`, rewards of answers",
        theirs="each weight divided by Z(x, c), as in Eq. 6's first line",
        ours="left out, as in its last",
        our_arm="reward of the answer",
        their_arm="divided by Z",
    ),
    "the condition's place, once a turn": Detail(
        made_by="`--template before_assistant`",
        theirs="before the assistant alone: OpenChat v2",
        ours="before both speakers; so in OpenChat v3.2",
        their_arm="before_assistant",
    ),
    "the condition's place, once": Detail(
        made_by="`--template beginning`",
        theirs="at the beginning: OpenChat v3.1",
        ours="before both speakers; so in OpenChat v3.2",
        their_arm="beginning",
    ),
    "four micro-batches": Detail(
        made_by="`--micro_tokens 192`",
        theirs="four of 192 tokens; the divisor is ours",
        ours="one of 768 tokens",
        their_arm="four micro-batches",
    ),
    "the divisor: a micro-batch's weights": Detail(
        made_by="`by_micro_batch`, `--micro_tokens 192`",
        theirs="four of 192 tokens, each by its own sum, then by tokens: LLaMA-Factory v1",
        ours="the step's sum, four of 192 tokens",
        our_arm="four micro-batches",
        their_arm="by micro-batch",
    ),
    "the divisor: one conversation's weights": Detail(
        made_by="`one_conversation_a_micro_batch`",
        theirs="the same where a micro-batch is one conversation: 0.1 counts as 1.0",
        ours="the step's sum",
        their_arm="one conversation",
    ),
    "the divisor: a conversation's length": Detail(
        made_by="`by_length`",
        theirs="each conversation's mean: OpenChat until 2023-09",
        ours="by token, as Eq. 6 sums",
        their_arm="by length",
    ),
    "the divisor: 8 ranks once more": Detail(
        made_by="`divided_by_ranks`",
        theirs="gradients 8 times smaller: OpenChat until 2023-11-25",
        ours="the step's sum, once",
        their_arm="by ranks",
    ),
    "classes in a step": Detail(
        made_by="`classes_by_chance`",
        theirs="as packing happens to fill it: OpenChat",
        ours="dealt in proportion",
        their_arm="by chance",
    ),
    "the last step of an epoch": Detail(
        made_by="`last_step_dropped`",
        theirs="dropped where it is short: OpenChat; here a full one",
        ours="kept",
        their_arm="last step",
    ),
    "attention leaks": Detail(
        made_by="`leaking`",
        theirs="LLaMA-Factory's `packing` without `neat_packing`",
        ours="each conversation by itself; so in OpenChat",
        their_arm="leaking",
    ),
    "attention leaks, positions run on": Detail(
        made_by="`leaking_in_one_row`",
        theirs="one row of text, as TRL's `wrapped` makes it",
        ours="each conversation by itself; so in OpenChat",
        their_arm="one row",
    ),
    "the new token's row: random": Detail(
        made_by="`NewRow`",
        theirs="transformers' `mean_resizing=False`",
        ours="the mean of the others; so in OpenChat",
        our_arm="mean row",
        their_arm="random row",
    ),
    "the new token's row: zero": Detail(
        made_by="`NewRow`",
        theirs="0",
        ours="the mean of the others; so in OpenChat",
        our_arm="mean row",
        their_arm="zero row",
    ),
    "the learning rate, a quarter of the batch": Detail(
        made_by="`--batch_tokens 192`",
        theirs="unchanged",
        ours="by the square root, half; so in OpenChat",
        our_arm="quarter",
        their_arm="quarter, same lr",
    ),
    "the learning rate, four times the batch": Detail(
        made_by="`--batch_tokens 3072`",
        theirs="unchanged",
        ours="by the square root, twice; so in OpenChat",
        our_arm="four times",
        their_arm="four times, same lr",
    ),
}
HEAD = [
    "detail; what makes their arm",
    "theirs",
    "ours",
    "sampled: ours; theirs; theirs - ours",
    "greedy: ours; theirs; theirs - ours",
    "here",
]


def verdict(differences: dict[str, list[float]]) -> str:
    """`matters` where an interval of differences, sampled or greedy, leaves out 0."""
    for values in differences.values():
        mean, half = interval(values)
        if half is None:
            return "one seed"
        if abs(mean) > half:
            return "matters"
    return "not here"


def details_table(results: dict) -> tuple[dict, str]:
    numbers = {}
    table = []
    for name, detail in DETAILS.items():
        our_runs = results[detail.our_arm]
        their_runs = results[detail.their_arm]
        row = {"ours": {}, "theirs": {}, "theirs - ours": {}}
        cells = []
        for how in HOW:
            ours = [expert_score(result, how) for result in our_runs]
            theirs = [expert_score(result, how) for result in their_runs]
            # seed by seed: the same data, the same held-out prompts
            further = [b - a for a, b in zip(ours, theirs)]
            row["ours"][how] = ours
            row["theirs"][how] = theirs
            row["theirs - ours"][how] = further
            cells.append(f"{fmean(ours):.3f}; {fmean(theirs):.3f}; {cell(further)}")
        row["here"] = verdict(row["theirs - ours"])
        # where most of a difference comes from
        row["scarce skill"] = {
            "ours": list(map(scarce, our_runs)),
            "theirs": list(map(scarce, their_runs)),
        }
        numbers[name] = row
        first = f"{name}; {detail.made_by}"
        table.append([first, detail.theirs, detail.ours, *cells, row["here"]])
    return numbers, markdown(HEAD, table)


# arms whose steps hold the classes in another way
STEPS_OF = ("ours", "by chance", "four micro-batches", "quarter", "four times")


def steps_table(results: dict) -> tuple[dict, str]:
    """How even the classes are over the steps of the first epoch, with the first seed."""
    numbers = {}
    table = []
    for name in STEPS_OF:
        share_S = expert_shares(results[name][0])
        row = {
            "steps": len(share_S),
            "lowest": share_S.min(),
            "highest": share_S.max(),
            "without": (share_S == 0).mean(),
        }
        numbers[name] = {key: float(value) for key, value in row.items()}
        range_ = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        table.append([name, row["steps"], range_, f"{row['without']:.0%}"])
    head = ["arm", "steps of an epoch", "expert's share of a step's weight", "steps without any"]
    return numbers, markdown(head, table)


def expert_shares(result: dict) -> np.ndarray:
    """fp64 [S]: the expert's share of the weight of each step of a run's first epoch."""
    folder = Path(result["folder"])
    settings = json.loads((folder / "run.json").read_text())
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: settings[name] for name in names})
    data = Prepared(folder / "train.safetensors")
    train_on, _ = data.split(config.val_fraction)
    cost = train_flops(read_config(folder / "hf")).plan_cost
    change = result["run"].get("variant")
    with replaced(change) if change else contextlib.nullcontext():
        steps = epoch_steps(data, train_on, config, epoch=0, cost=cost)

    shares = []
    for step in steps:
        of_step = flat([step])
        weights = data.weight_sums[of_step]
        # the expert's class is the first
        shares.append(weights[data.class_ids[of_step] == 0].sum() / weights.sum())
    return np.array(shares)


def report(results: dict, folder: Path) -> tuple[dict, str]:
    numbers, table = details_table(results)
    of_steps, table_of_steps = steps_table(results)
    return {"details": numbers, "steps": of_steps}, f"{table}\n\n{table_of_steps}"


def main(argv: list[str]) -> None:
    command("details", argv)


if __name__ == "__main__":
    run(main)
