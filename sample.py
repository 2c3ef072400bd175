"""Talk to a C-RLFT model: in the terminal, one prompt, or a file of them. At inference only the expert's template is used.

    python sample.py out/demo/hf                                    chat
    python sample.py out/demo/hf --prompt "reverse a c b d"
    python sample.py out/demo/hf --input prompts.jsonl --output answers.jsonl
    python sample.py out/demo/hf --prompt "reverse a c b d" --condition GPT3       the other class's prompt (Fig. 5)

prompts.jsonl has a {"prompt": ..} or {"messages": [{"role", "content"}, ..]} per line; answers.jsonl the same rows with
"response" and "finish" ("stop" or "length").

Shapes: B prompts, V vocab.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from conversations import Message, parse, read_rows
from model import KVCache
from packing import pack
from prompts import BASELINES, PROMPTS, tokenize_prompt
from support.cli import parse_args, run
from support.files import read_json
from support.hf import load_model, read_config
from tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    folder: tuple = ()
    prompt: str | None = None
    input: str | None = None
    output: str | None = None
    condition: str | None = None  # default: the expert's, from crlft.json
    # default: the one trained with; another model's, or `base`, the raw text: prompts.py
    template: str | None = None
    system: str | None = None
    temperature: float = 0.7  # 0: always the likeliest token
    top_k: int | None = None
    top_p: float = 1.0
    max_new: int = 512
    seed: int = 0
    batch: int = 16
    # cut a prompt that leaves no room for max_new tokens, instead of stopping where it leaves none
    truncate_left: bool = False


class Speaker:
    """A model with the tokenizer, template and condition it is spoken to with."""

    def __init__(self, folder, condition=None, template=None, device=None, seed=0):
        folder = Path(folder)
        if not (folder / "config.json").is_file() and (folder / "hf" / "config.json").is_file():
            folder = folder / "hf"  # the --out of train.py
        config = read_config(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        crlft = folder / "crlft.json"
        meta = read_json(crlft) if crlft.is_file() else None
        if meta is None and not (condition or template):
            raise ValueError(
                f"{folder}: no crlft.json, so no default prompt; say --condition NAME or --template NAME"
            )
        self.template = template or (meta["template"] if meta else "before_speaker")
        if self.template not in PROMPTS:
            raise ValueError(f"--template {self.template!r} is not one of {', '.join(PROMPTS)}")
        names = [c["name"] for c in meta["classes"]] if meta else []
        conditions = (
            {c[key]: c["condition"] for key in ("condition", "name") for c in meta["classes"]}
            if meta
            else {}
        )
        if condition and meta and condition not in conditions:
            raise ValueError(
                f"--condition {condition!r} is none of the classes trained with: {', '.join(names)}"
            )
        self.condition = (
            conditions.get(condition, condition)
            if condition
            else conditions[meta["expert"]]
            if meta
            else "GPT4"
        )
        self.tokenizer = Tokenizer(folder / "tokenizer.model")
        self.stops = self.tokenizer.eot, self.tokenizer.eos
        if config.vocab_size < self.tokenizer.eot:
            raise ValueError(
                f"{folder}: vocab_size {config.vocab_size} is below the {self.tokenizer.eot} tokens of tokenizer.model"
            )
        self.model = load_model(
            folder, device, torch.bfloat16 if device == "cuda" else torch.float32
        )
        # the same matrices stored by columns: a product with one row then streams them twice as
        # fast
        if device == "cpu":
            for linear in self.model.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.data = linear.weight.data.t().contiguous().t()
        # cut: prompts that lost their beginning
        self.context, self.cut = config.max_position_embeddings, 0
        # one stream for all that this speaker says
        self.generator = torch.Generator(device).manual_seed(seed)

    def ids(self, messages, system=None, truncate_left=False, max_new=1):
        """The prompt's token ids. ValueError when they fill the context, unless the oldest may go (the <s> stays)."""
        ids = tokenize_prompt(messages, self.tokenizer, self.template, self.condition, system)
        # half of the context is the prompt's at least
        room = max(self.context // 2, self.context - max_new)
        if len(ids) < self.context and not truncate_left or len(ids) <= room:
            return ids
        if not truncate_left:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context {self.context}; shorten it, or --truncate_left"
            )
        self.cut += 1
        return [ids[0], *ids[1 - room :]]

    def text(self, ids):
        text, stop = (
            self.tokenizer.decode(ids),
            self.template in BASELINES and BASELINES[self.template].stop,
        )
        return text.split(stop)[0].rstrip() if stop else text

    def generate(self, prompts, config):
        """Yield, a step at a time, the next token id of each of B prompts (lists of ids), None once its answer has ended.

        An answer ends with `<|end_of_turn|>` or `</s>`, its last id then, or after max_new ids, or where the context does.
        """
        device, tokenizer = self.model.lm_head.weight.device, self.tokenizer
        room = [min(config.max_new, self.context - len(ids)) for ids in prompts]
        batch = pack([(np.array(ids), np.zeros(len(ids))) for ids in prompts]).to(device)
        # a row that has ended runs on with the others, unseen
        slots = max(map(len, prompts)) + max(room)
        cache = KVCache(
            self.model.config, len(prompts), slots, device, self.model.lm_head.weight.dtype
        )
        logits_BV = self.model.prefill(batch.tokens_T, batch.positions_T, batch.cu_seqlens, cache)
        ended = [False] * len(prompts)
        for step in range(1, max(room) + 1):
            logits_BV[:, tokenizer.eot + 1 :] = -torch.inf  # rows of a padded vocabulary
            tokens_B = choose(logits_BV, config, self.generator)
            ids = tokens_B.tolist()
            yield [None if end else i for end, i in zip(ended, ids)]
            ended = [end or i in self.stops or step >= n for end, i, n in zip(ended, ids, room)]
            if all(ended):
                return
            logits_BV = self.model.decode(tokens_B, cache)

    def answer(self, prompts, config):
        """[(ids, finish)] of a list of prompts' ids, finish "stop" or "length"."""
        steps = list(self.generate(prompts, config))
        answers = [[ids[b] for ids in steps if ids[b] is not None] for b in range(len(prompts))]
        return [(ids[:-1], "stop") if ids[-1] in self.stops else (ids, "length") for ids in answers]

    def answer_each(self, prompts, config):
        """Yield (index, (ids, finish)) for any number of prompts, in batches of like length, with a progress bar and tokens/s."""
        order, tokens, began = (
            sorted(range(len(prompts)), key=lambda i: len(prompts[i])),
            0,
            time.monotonic(),
        )
        with tqdm(total=len(prompts), unit=" prompts", disable=None) as bar:
            for start in range(0, len(order), config.batch):
                rows = order[start : start + config.batch]
                answers = self.answer([prompts[i] for i in rows], config)
                tokens += sum(len(ids) for ids, _ in answers)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
                bar.update(len(rows))
                yield from zip(rows, answers)

    def answer_all(self, prompts, config):
        """[(ids, finish)] of any number of prompts, in their order."""
        answers = dict(self.answer_each(prompts, config))
        return [answers[i] for i in range(len(prompts))]


def choose(logits_BV, config, generator):
    """tokens_B drawn from softmax(logits / temperature), cut to the top_k likeliest and to the smallest set of mass top_p."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV, order_BV = (logits_BV / config.temperature).softmax(-1).sort(dim=-1, descending=True)
    probs_BV[:, config.top_k or logits_BV.shape[1] :] = 0
    # mass of the likelier tokens; the likeliest itself always stays
    before_BV = probs_BV.cumsum(-1) - probs_BV
    probs_BV[before_BV >= config.top_p] = 0
    pick_B1 = torch.multinomial(probs_BV, 1, generator=generator)
    return order_BV.gather(1, pick_B1)[:, 0]


def say(speaker, ids, config):
    """Stream one answer to the terminal; returns its text."""
    answer, shown = [], ""
    for (i,) in speaker.generate([ids], config):
        if i is not None:
            answer.append(i)
        text = speaker.text(answer)
        if not text.endswith("\ufffd"):  # half of a character in bytes: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(speaker.text(answer)[len(shown) :])
    return speaker.text(answer)


def chat(speaker, config):
    print(
        f"condition {speaker.condition or '-'}, template {speaker.template}; an empty line or Ctrl-D ends the chat"
    )
    messages = []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if not line:
            return
        messages.append(Message("user", line))
        ids = speaker.ids(messages, config.system, config.truncate_left, config.max_new)
        messages.append(Message("assistant", say(speaker, ids, config)))


def read_prompts(path, system):
    """(rows, [(messages, system)]) of an --input file."""
    rows, prompts = [], []
    for where, row in read_rows(path):
        prompt = isinstance(row, dict) and "messages" not in row and row.get("prompt")
        conversation = parse(
            {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else row,
            where,
        )
        if conversation.messages[-1].role != "user":
            raise ValueError(
                f"{where}: the last message is not the user's, so there is nothing to answer; remove it"
            )
        rows.append(row)
        prompts.append(
            (conversation.messages, system if conversation.system is None else conversation.system)
        )
    if not rows:
        raise ValueError(
            f'{path}: no prompts; each line is a {{"prompt": ..}} or {{"messages": [..]}}'
        )
    return rows, prompts


def answer_file(speaker, config):
    """--input to --output: the same rows in the same order, with response and finish."""
    rows, prompts = read_prompts(config.input, config.system)
    ids = []
    for row, (messages, system) in enumerate(prompts, 1):
        try:
            ids.append(speaker.ids(messages, system, config.truncate_left, config.max_new))
        except ValueError as error:
            raise ValueError(f"{config.input}: row {row}: {error}") from None
    partial = Path(f"{config.output}.{os.getpid()}.partial")
    try:
        # opened first: a folder that can't be written costs no answers
        with open(partial, "w", encoding="utf-8") as file:
            for row, (answer, finish) in zip(rows, speaker.answer_all(ids, config)):
                file.write(
                    json.dumps(
                        row | {"response": speaker.text(answer), "finish": finish},
                        ensure_ascii=False,
                    )
                    + "\n"
                )
        partial.replace(config.output)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{len(rows)} answers in {config.output}", file=sys.stderr)


def check_sampling(config):
    if (
        not 0 <= config.temperature < math.inf
        or 0 < config.temperature < 1e-3
        or not 0 < config.top_p <= 1
    ):
        raise ValueError(
            "--temperature is 0 (the likeliest token) or at least 0.001, --top_p above 0 and at most 1"
        )
    if (
        config.max_new < 1
        or config.batch < 1
        or (config.top_k or 1) < 1
        or not 0 <= config.seed < 2**63
    ):
        raise ValueError(
            "--max_new, --batch and --top_k are at least 1, --seed is from 0 to 2^63 - 1"
        )
    return config


def main(argv):
    config = parse_args(SampleConfig, argv, positional="folder")
    if len(config.folder) != 1:
        raise ValueError(
            "give one model directory: python sample.py DIR [--prompt TEXT | --input FILE --output FILE]"
        )
    if bool(config.input) != bool(config.output):
        raise ValueError("--input and --output go together")
    check_sampling(config)
    speaker = Speaker(config.folder[0], config.condition, config.template, seed=config.seed)
    if config.prompt is not None:
        say(
            speaker,
            speaker.ids(
                [Message("user", config.prompt)],
                config.system,
                config.truncate_left,
                config.max_new,
            ),
            config,
        )
    elif config.input:
        answer_file(speaker, config)
    else:
        chat(speaker, config)
    if speaker.cut:
        print(f"{speaker.cut} prompts cut on the left", file=sys.stderr)


if __name__ == "__main__":
    run(main)
