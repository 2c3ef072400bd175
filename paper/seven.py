"""Real text: seven models' answers to the same prompts as seven classes, and the held-out loss of each under each prompt.

    python -m paper.seven --assets DIR     DIR has conversations/mixed_quality.jsonl and llama2/tokenizer.model

One `small` model from random weights with Llama-2's tokenizer, 250 steps of 2,048 tokens: far too little to answer, enough to ask
whether the condition carries the source. Prompts are held out, never rows: all seven answers to a prompt are on one side, the same
35 prompts for every seed, so that the intervals are over training only. Conversations are cut at 256 tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from conversations import group_of, parse, read_rows
from paper.runs import BATCH_TOKENS, Job, cell, command, figure, fine_tune, markdown, prepared
from sample import Speaker
from support.cli import run
from support.files import sha256

SEEDS, NEEDS_ASSETS, BATCH, HELD_OUT = 3, True, 2048, 0.05
CONVERSATIONS = "conversations/mixed_quality.jsonl"
CONDITIONS = {  # a row's model: its class
    "GPT-4": "GPT4",
    "gpt-3.5-turbo-1106": "Turbo1106",
    "gpt-3.5-turbo-0613": "Turbo0613",
    "gpt-3.5-turbo-0301": "Turbo0301",
    "gpt35_turbo_instruct": "Instruct",
    "text_davinci_003": "Davinci3",
    "text_davinci_001": "Davinci1",
}
TABLE = ",".join(
    f"Model: {label}={name}:{1 if name == 'GPT4' else 0.1}" for label, name in CONDITIONS.items()
)


@dataclass(frozen=True)
class Seven(Job):
    @property
    def key(self):
        return f"{super().key}-{sha256(f'{self.assets}/{CONVERSATIONS}')[:8]}"

    @property
    def cost(self):
        return self.steps * BATCH / BATCH_TOKENS * 13

    def do(self, folder):
        """{"loss": {source: {prompt: nll per token of its held-out answers}}}"""
        tokenizer = f"{self.assets}/llama2/tokenizer.model"
        rows = [row for _, row in read_rows(f"{self.assets}/{CONVERSATIONS}")]
        flags = {
            "model": "small",
            "seed": self.seed,
            "steps": self.steps,
            "batch_tokens": BATCH,
            "val_fraction": HELD_OUT,
            "val_every": self.steps,
        }
        fine_tune(folder, rows, TABLE, "before_speaker", flags, tokenizer, max_len=256)
        model, loss = (
            Speaker(folder / "hf", device="cpu").model,
            {name: {} for name in CONDITIONS.values()},
        )
        # Prepared.split's
        held_out = [row for row in rows if group_of(parse(row, "")) % 10_000 < HELD_OUT * 10_000]
        for prompt in CONDITIONS.values():
            # a class for each weight
            table = ",".join(
                f"Model: {label}={prompt}:{k}" for k, label in enumerate(CONDITIONS, 1)
            )
            data = prepared(
                folder / f"held_out_{prompt}.safetensors", held_out, table, tokenizer, max_len=256
            )
            nll, tokens = np.zeros(len(CONDITIONS)), np.zeros(len(CONDITIONS))
            for part in np.array_split(np.arange(len(data)), max(1, len(data) // 16)):
                batch = data.batch(part)
                with torch.no_grad():
                    *_, nll_T, _ = model(
                        batch.tokens_T,
                        batch.positions_T,
                        batch.cu_seqlens,
                        batch.labels_T,
                        batch.weights_T,
                        rows_R=batch.rows_R,
                        per_row=True,
                    )
                np.add.at(nll, batch.class_R.numpy(), nll_T[batch.rows_R].numpy())
                np.add.at(tokens, batch.class_R.numpy(), 1)
            for source, x in zip(CONDITIONS.values(), nll / tokens):
                loss[source][prompt] = float(x)
        return {"loss": loss}


def runs(seed):
    return {"seven": Seven("seven real sources", seed, 250)}


def report(results, folder):
    names = list(CONDITIONS.values())
    # [seed, source, prompt]
    loss = np.array(
        [
            [[r["loss"][source][prompt] for prompt in names] for source in names]
            for r in results["seven"]
        ]
    )
    own = np.diagonal(loss, axis1=1, axis2=2)  # [seed, source]
    others = (loss.sum(2) - own) / (len(names) - 1)

    def draw(axes):
        image = axes.imshow((loss - own[:, :, None]).mean(0), cmap="coolwarm")
        axes.set_xticks(range(len(names)), names, rotation=45, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(xlabel="prompt", ylabel="source of the held-out answers")
        axes.figure.colorbar(image, label="nll above that of the source's own prompt")

    figure(folder / "seven.png", draw, 6, 5)
    table = [
        [name, *(f"{x:.3f}" for x in loss.mean(0)[i]), cell(others[:, i] - own[:, i])]
        for i, name in enumerate(names)
    ]
    return {"names": names, "loss": loss.tolist()}, markdown(
        ["held-out answers of", *(f"`{n} User:`" for n in names), "other prompts - own"], table
    )


if __name__ == "__main__":
    run(command("seven"))
