"""What the two arms of paper/real.py make of held-out answers: measured and sampled.

Every source's answer to every held-out prompt goes through the models three times:

    GPT4    the C-RLFT model, under the expert's prompt
    GPT3    the same model, under the other's prompt
    none    the model without condition

What is kept are the nats of each token, -log p. real_report.py makes tables of them.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from conversations import (
    Classes,
    Conversation,
    Message,
    cut_to_length,
    parse,
    parse_classes,
    prompt_hash,
)
from packing import pack
from paper.seven import HELD_OUT, is_held_out
from sample import SampleConfig, Speaker
from support.files import file_sha256
from support.kept import rows_sha256

# {arm: its template}
ARMS = {"c-rlft": "before_speaker", "no-condition": "none"}
# {how is asked: (arm, condition)}
ASKED = {"GPT4": ("c-rlft", "GPT4"), "GPT3": ("c-rlft", "GPT3"), "none": ("no-condition", "")}
SAMPLES = 5
LONGEST_SAMPLE = 160


def held_out(rows: list[dict]) -> dict[int, list[Conversation]]:
    """{a held-out prompt's hash: the answers to it}, prompts in the order of the files."""
    found = {}
    for row in rows:
        if is_held_out(row):
            conversation = parse(row, "")
            found.setdefault(prompt_hash(conversation), []).append(conversation)
    if not found:
        raise ValueError(f"no prompt falls into the {HELD_OUT:.0%} that are held out; give more")
    return found


def measure(out: Path, rows: list[dict], max_len: int) -> list[dict]:
    """A {"asked", "prompt", "answers"} for each held-out prompt and way to ask.

    What a stopped call has measured stands in measured.jsonl, and is kept as long as the model and
    the answers to the prompt are the same.
    """
    prompts = held_out(rows)
    path = out / "measured.jsonl"
    done = {}
    for line in read_measured(path):
        done[line["model"], line["asked"], line["prompt"], line.get("answers_of")] = line

    measured = []
    bar = tqdm(total=len(ASKED) * len(prompts), unit=" prompts", disable=None, dynamic_ncols=True)
    with open(path, "a", buffering=1) as file, bar:
        # behind a line that a stopped call has torn
        if path.stat().st_size and not path.read_text().endswith("\n"):
            file.write("\n")
        for asked, (arm, condition) in ASKED.items():
            folder = out / arm / "hf"
            model = file_sha256(folder / "manifest.json")
            speaker = None
            for prompt, conversations in prompts.items():
                answers_of = digest_of_answers(conversations, max_len)
                line = done.get((model, asked, prompt, answers_of))
                if line is None:
                    speaker = speaker or Speaker(folder, device="cpu")
                    answers = nats_of(speaker, conversations, ARMS[arm], condition, max_len)
                    line = {"model": model, "asked": asked, "prompt": prompt}
                    line |= {"answers_of": answers_of, "answers": answers}
                    file.write(json.dumps(line) + "\n")
                measured.append(line)
                bar.update()
    return measured


def digest_of_answers(conversations: list[Conversation], max_len: int) -> str:
    """Of all that the measurement of a prompt reads, beside the model."""
    read = [max_len]
    for conversation in conversations:
        texts = [[message.role, message.text] for message in conversation.messages]
        read.append([conversation.label, conversation.system, texts])
    return rows_sha256(read)


def read_measured(path: Path) -> list[dict]:
    """The lines of an earlier call, without one that it was stopped in."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


@torch.no_grad()
def nats_of(
    speaker: Speaker,
    conversations: list[Conversation],
    template: str,
    condition: str,
    max_len: int,
) -> list[dict]:
    """[{"source", "text", "end"}] of the answers to one prompt, asked under this condition.

    text: the nats of each token of the answer; end: those of the end of turn, [] if it is cut off.
    """
    classes = Classes(parse_classes(f"*={condition or 'none'}:1"))
    parts = []
    answers = []
    # [the answer that each part is of]
    owners = []
    for i, conversation in enumerate(conversations):
        # what a row says of itself must not decide how is asked
        asked = dataclasses.replace(conversation, condition=None, weight=None, reward=None)
        kept, _ = cut_to_length(
            classes.assign(asked), speaker.tokenizer, template, max_len, "truncate"
        )
        # none of an empty answer, or where the prompt leaves no room for one
        parts += kept
        owners += [i] * len(kept)
        answers.append({"source": conversation.label, "text": [], "end": []})
    if not parts:
        return answers

    # all answers side by side, each a class of its own
    batch = pack(parts, np.array(owners))
    losses = speaker.model(*batch.inputs)
    is_end_R = batch.labels_T[batch.rows_R] == speaker.tokenizer.eot
    nats_R = losses.nll_T[batch.rows_R]
    for i, is_end, nats in zip(batch.class_R.tolist(), is_end_R.tolist(), nats_R.tolist()):
        answers[i]["end" if is_end else "text"].append(round(nats, 5))
    return answers


def samples(out: Path, rows: list[dict]) -> list[dict]:
    """{"prompt", "GPT4", "GPT3"}: the C-RLFT model's answers to the first held-out prompts.

    Drawn with seed 0 and sample.py's temperature, all prompts side by side; none is left out.
    """
    asked = []
    for conversations in list(held_out(rows).values())[:SAMPLES]:
        asked.append(conversations[0].messages[0].text)
    config = SampleConfig(max_new=LONGEST_SAMPLE)
    speaker = Speaker(out / "c-rlft" / "hf", "GPT4", device="cpu", seed=config.seed)
    answers = {}
    for condition in ("GPT4", "GPT3"):
        speaker = speaker.under(condition, config.seed)
        prompts = [speaker.ids([Message("user", text)]) for text in asked]
        answers[condition] = [speaker.text(a.ids) for a in speaker.answer_all(prompts, config)]
    found = []
    for i, prompt in enumerate(asked):
        found.append({"prompt": prompt} | {name: answers[name][i] for name in answers})
    return found
