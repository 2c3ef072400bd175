"""Real text: seven models' answers to the same prompts as seven classes.

    python -m paper.seven --assets DIR     DIR has conversations/mixed_quality.jsonl and
                                           llama2/tokenizer.model

What is measured is the held-out loss of each model's answers under each of the seven prompts. One
`small` model from random weights with Llama-2's tokenizer, 250 steps of 2,048 tokens: far too
little to answer, enough to ask whether the condition carries the source. Prompts are held out,
never rows: all seven answers to a prompt are on one side, the same 35 prompts for every seed, so
that the intervals are over training only. Conversations are cut at 256 tokens.
"""

# in arrays: [seed, source, prompt], seven sources and seven prompts

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from conversations import parse, prompt_hash
from data import HASH_SHARES, Prepared
from model import Model
from paper.commands import ASSETS, cell, command, markdown, open_figure, save_figure
from paper.runs import BATCH_TOKENS, Job, prepared, train_on
from sample import Speaker
from support.cli import run
from support.files import file_sha256
from support.rows import read_rows

SEEDS = 3
NEEDS_ASSETS = True
STEPS = 250
# tokens of a step
BATCH = 2048
MAX_LEN = 256
# the small preset's time for a token, in the toy's
COST_OF_TOKEN = 13
HELD_OUT = 0.05
# conversations that go through the model at once, about
AT_ONCE = 16
CONVERSATIONS, TOKENIZER = ASSETS
# a row's model: its class
CONDITION_OF = {
    "GPT-4": "GPT4",
    "gpt-3.5-turbo-1106": "Turbo1106",
    "gpt-3.5-turbo-0613": "Turbo0613",
    "gpt-3.5-turbo-0301": "Turbo0301",
    "gpt35_turbo_instruct": "Instruct",
    "text_davinci_003": "Davinci3",
    "text_davinci_001": "Davinci1",
}
NAMES = list(CONDITION_OF.values())
WEIGHT_OF = {name: 0.1 for name in NAMES} | {"GPT4": 1}
TABLE = ",".join(f"Model: {label}={name}:{WEIGHT_OF[name]}" for label, name in CONDITION_OF.items())


@dataclass(frozen=True)
class Seven(Job):
    """A model trained on all seven, and what it makes of each one's held-out answers."""

    @property
    def key(self) -> str:
        # whatever the folder is called: what is in its file
        return f"{super().key}-{file_sha256(self.conversations)[:8]}"

    @property
    def conversations(self) -> str:
        return f"{self.assets}/{CONVERSATIONS}"

    @property
    def cost(self) -> float:
        return self.steps * BATCH / BATCH_TOKENS * COST_OF_TOKEN

    def do(self, folder: Path) -> dict:
        """{"loss": {source: {prompt: nll per token of its held-out answers}}}"""
        tokenizer = f"{self.assets}/{TOKENIZER}"
        rows = [row for _, row in read_rows(self.conversations)]
        flags = {
            "model": "small",
            "seed": self.seed,
            "steps": self.steps,
            "batch_tokens": BATCH,
            "val_fraction": HELD_OUT,
            "val_every": self.steps,
        }
        train_on(folder, rows, TABLE, "before_speaker", flags, tokenizer, max_len=MAX_LEN)
        model = Speaker(folder / "hf", device="cpu").model

        held_out = [row for row in rows if is_held_out(row)]
        loss = {source: {} for source in NAMES}
        for prompt in NAMES:
            path = folder / f"held_out_{prompt}.safetensors"
            table = all_under(prompt)
            data = prepared(path, held_out, table, tokenizer, max_len=MAX_LEN)
            for source, nll in zip(NAMES, nll_by_class(model, data)):
                loss[source][prompt] = float(nll)
        return {"loss": loss}


def is_held_out(row: dict) -> bool:
    """As Prepared.split decides it: by the hash of the prompt."""
    return prompt_hash(parse(row, "")) % HASH_SHARES < HELD_OUT * HASH_SHARES


def all_under(prompt: str) -> str:
    """--classes that ask all sources under one prompt, and still keep them apart.

    A class is a condition and a weight, so each source gets another weight: 1, 2, .. 7.
    """
    parts = [f"Model: {label}={prompt}:{k}" for k, label in enumerate(CONDITION_OF, 1)]
    return ",".join(parts)


@torch.no_grad()
def nll_by_class(model: Model, data: Prepared) -> np.ndarray:
    """The mean nll of each class's supervised tokens, unweighted."""
    nll = np.zeros(len(NAMES))
    tokens = np.zeros(len(NAMES))
    parts = max(1, len(data) // AT_ONCE)
    for conversations in np.array_split(np.arange(len(data)), parts):
        batch = data.batch(conversations)
        losses = model(
            batch.tokens_T,
            batch.positions_T,
            batch.cu_seqlens,
            batch.labels_T,
            batch.weights_T,
            rows_R=batch.rows_R,
        )
        class_R = batch.class_R.numpy()
        np.add.at(nll, class_R, losses.nll_T[batch.rows_R].numpy())
        np.add.at(tokens, class_R, 1)
    return nll / tokens


def jobs(seed: int) -> dict:
    return {"seven": Seven("seven real sources", seed, STEPS)}


def report(results: dict, folder: Path) -> tuple[dict, str]:
    loss = np.array([losses_of(result) for result in results["seven"]])
    # [seed, source]: what an answer costs under its own prompt, and in the mean of the others
    own = np.diagonal(loss, axis1=1, axis2=2)
    others = (loss.sum(2) - own) / (len(NAMES) - 1)
    draw(loss - own[:, :, None], folder / "seven.png")

    table = []
    for i, name in enumerate(NAMES):
        by_prompt = [f"{nll:.3f}" for nll in loss.mean(0)[i]]
        table.append([name, *by_prompt, cell(others[:, i] - own[:, i])])
    asked = [f"`{name} User:`" for name in NAMES]
    head = ["held-out answers of", *asked, "other prompts - own"]
    numbers = {"names": NAMES, "loss": loss.tolist()}
    return numbers, markdown(head, table)


def losses_of(result: dict) -> list[list[float]]:
    """[source][prompt] of one seed."""
    losses = []
    for source in NAMES:
        losses.append([result["loss"][source][prompt] for prompt in NAMES])
    return losses


def draw(above_own: np.ndarray, path: Path) -> None:
    places = range(len(NAMES))
    figure, axes = open_figure(width=6.4, height=5.4)
    axes.grid(visible=False)
    image = axes.imshow(above_own.mean(0), cmap="Greys")
    axes.set_xticks(places, NAMES, rotation=45, ha="right")
    axes.set_yticks(places, NAMES)
    axes.set(xlabel="prompt", ylabel="source of the held-out answers")
    figure.colorbar(image, label="nll above that of the source's own prompt")
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("seven", argv)


if __name__ == "__main__":
    run(main)
