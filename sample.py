"""Talk to a trained model: in the terminal, one prompt, or a file of them.

    python sample.py out/demo/hf                                             chat
    python sample.py out/demo/hf --prompt "reverse a c b d"
    python sample.py out/demo/hf --input prompts.jsonl --output answers.jsonl
    python sample.py out/demo/hf --prompt "reverse a c b d" --condition GPT3
    python sample.py out/demo/hf --prompt "reverse a c b d" --condition GPT4,GPT3     Fig. 5

C-RLFT trains on an expert's answers and on a weaker source's, each under its own condition. At
inference only the expert's is used (Sec. 3.2): that is the default here. --condition asks as
another source would be asked; Fig. 5 shows how much worse the answers then are. Several conditions
answer side by side, and every answer gets its mean log-probability under each of them.

prompts.jsonl has a {"prompt": ..} or {"messages": [{"role", "content"}, ..]} per line;
answers.jsonl has the same rows with "response" and "finish" ("stop" or "length"). With several
conditions they have "responses" instead, a {"response", "finish", "logprob"} for each condition;
"logprob" has a number for each condition. While it works, answers.jsonl.partial keeps them: stopped
at any time, the same command goes on. A prompt's random numbers follow from --seed and its place in
the file, whatever is answered beside it.

Shapes: B prompts, S steps of generation, V vocab.
"""

import support.threads  # noqa: F401, first: how threads wait is said before torch is loaded

import copy
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from conversations import (
    FORMAT,
    FORMER_TEMPLATES,
    TURN_KEYS,
    Conversation,
    Message,
    first_of,
    parse,
    role_texts,
    template_of,
)
from model import KVCache
from packing import pack
from prompts import BASELINES, PROMPTS, prompt_tokenizer, tokenize_prompt
from support.cli import parse_args, run
from support.fields import read_fields
from support.files import written_whole
from support.hf import load_model, model_digest, read_config, tokenizer_files
from support.kept import KeptAnswers, Part, check_out, rows_sha256
from support.rows import read_rows
from tokenizer import TOKENIZER_FILES


@dataclass(frozen=True)
class SampleConfig:
    """What to ask, and how to draw the answer's tokens: the flags of sample.py."""

    # the model's directory, one: an export, or the --out of train.py
    folder: tuple = ()
    # one prompt, instead of a chat
    prompt: str | None = None
    # a file of prompts, instead of a chat
    input: str | None = None
    # where the answers to --input go
    output: str | None = None
    # under which class's prompt; several, with commas between, answer side by side
    # default: the expert's
    condition: str | None = None
    # another model's prompt, or `base`, the raw text: see prompts.py
    # default: the one trained with
    template: str | None = None
    # a system text, for every prompt that has none of its own
    system: str | None = None
    # what the logits are divided by; 0: always the likeliest token
    temperature: float = 0.7
    # draw from so many of the likeliest tokens; 0, or without it: from all
    top_k: int | None = None
    # draw from the fewest likeliest tokens that have this much of the probability
    top_p: float = 1.0
    # tokens of an answer, at most
    max_new: int = 512
    # of the random numbers; each prompt's follow from the seed and its place in the file
    seed: int = 0
    # prompts that are answered side by side
    batch: int = 16
    # cut a prompt that leaves no room for max_new tokens, instead of stopping where it leaves none
    truncate_left: bool = False


def check_sampling(config: SampleConfig) -> SampleConfig:
    """The same config. ValueError when its numbers make no sense."""
    # Below 0.001 logits / temperature may overflow. 0 itself means greedy and divides nothing.
    greedy = config.temperature == 0
    warm = 1e-3 <= config.temperature < math.inf
    if not (greedy or warm) or not 0 < config.top_p <= 1:
        raise ValueError(
            "--temperature is 0 (the likeliest token) or at least 0.001, "
            "--top_p above 0 and at most 1"
        )
    counts = [config.max_new, config.batch]
    # without a top_k, or with 0, every token can be drawn
    if config.top_k:
        counts.append(config.top_k)
    if min(counts) < 1 or not 0 <= config.seed < 2**63:
        raise ValueError(
            "--max_new, --batch and --top_k are at least 1, --seed is from 0 to 2^63 - 1"
        )
    return config


# ---- what a directory says of its model


def model_folder(folder: str | Path) -> Path:
    """The folder with config.json: the one given, or its hf/ when it is the --out of train.py."""
    folder = Path(folder)
    inside = folder / "hf"
    if not (folder / "config.json").is_file() and (inside / "config.json").is_file():
        return inside
    return folder


def read_training(folder: Path) -> dict | None:
    """crlft.json: the template and the classes trained with; None in another model's directory.

    ValueError: what is read of it is of another kind, or the expert is none of the classes.
    """
    path = folder / "crlft.json"
    if not path.is_file():
        return None
    fields = read_fields(path, "export the directory again")
    fields.text("template")
    fields.whole("format", 1, FORMAT, default=1)
    fields.text("prompts", default="")
    names = set()
    for class_ in fields.objects("classes"):
        class_.text("condition")
        names.add(class_.text("name"))
    if fields.text("expert") not in names:
        raise fields.wrong("expert", "the name of one of its classes")
    return fields.content


def tokenizer_file(folder: Path) -> Path:
    """ValueError: the directory has none."""
    files = tokenizer_files(folder)
    if not files:
        raise ValueError(
            f"{folder}: no {' or '.join(TOKENIZER_FILES)}; put the base's tokenizer there"
        )
    return files[0]


def choose_template(wanted: str | None, training: dict | None) -> str:
    """The template asked for; else the one trained with; else the paper's. ValueError: no such."""
    trained_with = template_of(training) if training else "before_speaker"
    template = wanted or trained_with
    if template not in (*PROMPTS, *FORMER_TEMPLATES):
        raise ValueError(f"--template {template!r} is not one of {', '.join(PROMPTS)}")
    return template


def choose_condition(wanted: str | None, training: dict | None) -> str:
    """What the prompt says of who answers. ValueError: a class that was not trained with."""
    if training is None:
        return wanted or "GPT4"
    conditions = conditions_by_name(training)
    if wanted and wanted not in conditions:
        names = ", ".join(c["name"] for c in training["classes"])
        raise ValueError(f"--condition {wanted!r} is none of the classes trained with: {names}")
    return conditions[wanted or training["expert"]]


def conditions_by_name(training: dict) -> dict[str, str]:
    """{what --condition may say: the condition in the prompt} of the classes trained with."""
    # a class can be asked for by its condition or by its name; the name goes first
    classes = training["classes"]
    conditions = {c["condition"]: c["condition"] for c in classes}
    return conditions | {c["name"]: c["condition"] for c in classes}


def split_conditions(wanted: str | None, training: dict | None) -> list[str | None]:
    """The names in --condition's text, which may be several with commas between; [None] of None.

    A class may have a comma in its own name: a text that is the name of a class is that one class.
    """
    if wanted is None or (training and wanted in conditions_by_name(training)):
        return [wanted]
    return [name.strip() for name in wanted.split(",")]


def check_comparison(names: list[str], template: str, training: dict | None) -> None:
    """ValueError: the prompts of these conditions cannot all be made, or are not all different."""
    place = f"--condition {','.join(names)}"
    if "" in names:
        raise ValueError(f"{place}: there is no name at one side of a comma")
    name_of = {}
    for name in names:
        condition = choose_condition(name, training)
        if condition in name_of:
            raise ValueError(
                f"{place}: {name_of[condition]!r} and {name!r} are one condition; name it once"
            )
        name_of[condition] = name

    # other models' templates and the raw text; and "none", which any condition leaves as it is
    foreign = template in (*BASELINES, "openchat", "base")
    if foreign or role_texts(template, "a") == role_texts(template, "b"):
        raise ValueError(
            f"{place}: template {template!r} has no place for a condition, so all prompts are the "
            "same; leave out --condition or --template"
        )


def store_by_columns(model: torch.nn.Module) -> None:
    """The same matrices, stored by columns: on a CPU a product with one row then streams a matrix
    twice as fast, and generating is nothing but such products."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


# ---- the model and how it is spoken to


class Answer(NamedTuple):
    """The token ids of an answer, without the id that ended it."""

    ids: list[int]
    # "stop": the model ended it; "length": max_new or the context did
    finish: str


class Speaker:
    """A model with the tokenizer, template and condition it is spoken to with."""

    def __init__(
        self,
        folder: str | Path,
        condition: str | None = None,
        template: str | None = None,
        device: str | None = None,
        seed: int = 0,
    ):
        folder = model_folder(folder)
        self.folder = folder
        config = read_config(folder)
        training = read_training(folder)
        if training is None and not (condition or template):
            raise ValueError(
                f"{folder}: no crlft.json, so no default prompt; "
                "say --condition NAME or --template NAME"
            )
        self.template = choose_template(template, training)
        self.condition = choose_condition(condition, training)

        self.tokenizer = prompt_tokenizer(self.template, tokenizer_file(folder))
        # either id ends an answer: the turn's end of our training, and the base model's </s>
        self.stops = self.tokenizer.eot, self.tokenizer.eos
        self.vocab_size = config.vocab_size
        if config.vocab_size < self.tokenizer.file_size:
            raise ValueError(
                f"{folder}: vocab_size {config.vocab_size} is below "
                f"the {self.tokenizer.file_size} tokens of its tokenizer"
            )

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = load_model(folder, device, dtype)
        if device == "cpu":
            store_by_columns(self.model)
        self.context = config.max_position_embeddings

        # every answer has random numbers of its own, by the seed and how many were asked before
        self.seed = seed
        self.asked = 0
        # how many prompts have lost their beginning
        self.cut = 0

    def under(self, condition: str, seed: int) -> "Speaker":
        """The same model, spoken to under another condition, from the first random numbers on."""
        other = copy.copy(self)
        other.condition = condition
        other.seed = seed
        other.asked = 0
        other.cut = 0
        return other

    def ids(
        self,
        messages: list[Message],
        system: str | None = None,
        truncate_left: bool = False,
        max_new: int = 1,
    ) -> list[int]:
        """The prompt's token ids, made by the function that makes the training data's.

        ValueError when they fill the context; with truncate_left the oldest go instead, but for
        the `<s>`.
        """
        ids = tokenize_prompt(messages, self.tokenizer, self.template, self.condition, system)
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"the model has no {self.tokenizer.end_of_turn}, which a prompt with a system text "
                f"or several turns has in template {self.template}; take another --template"
            )

        # An answer of max_new tokens needs its room, but half of the context is the prompt's.
        room = max(self.context // 2, self.context - max_new)
        if len(ids) <= room:
            return ids
        if not truncate_left:
            # an answer that ends where the context does is still an answer
            if len(ids) < self.context:
                return ids
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context {self.context}; "
                "shorten it, or --truncate_left"
            )
        self.cut += 1
        newest = ids[1 - room :]
        return [ids[0], *newest]

    def text(self, ids: list[int]) -> str:
        """An answer's text, up to where another model's template says that it ends."""
        text = self.tokenizer.decode(ids)
        stop = BASELINES[self.template].stop if self.template in BASELINES else None
        if stop:
            return text.split(stop)[0].rstrip()
        return text

    def numbers(self, n: int) -> range:
        """The numbers of the next n prompts to be asked."""
        first = self.asked
        self.asked += n
        return range(first, self.asked)

    def generate(
        self,
        prompts: list[list[int]],
        config: SampleConfig,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[list]:
        """Yield, a step at a time, the next token id of each of B prompts; None once one has ended.

        An answer ends with `<|end_of_turn|>` or `</s>`, which is then its last id, or after max_new
        ids, or where the context ends. numbers: the prompts', which their random numbers follow
        from; the next ones where it is None.
        """
        room = [min(config.max_new, self.context - len(ids)) for ids in prompts]
        if numbers is None:
            numbers = self.numbers(len(prompts))

        # All prompts go through the model once, packed as in training; the cache keeps their keys
        # and values, so that from then on a step costs one token of each.
        logits_BV, cache = self.prefill(prompts, steps=max(room))
        uniform_SB = uniforms(self.seed, numbers, max(room)).to(logits_BV.device)

        ended = [False] * len(prompts)
        for step in range(1, max(room) + 1):
            # a padded vocabulary has rows that no token of the tokenizer stands for
            logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf
            tokens_B = choose(logits_BV, config, uniform_SB[step - 1])

            # an answer that has ended runs on with the others, unseen
            seen = []
            for b, token in enumerate(tokens_B.tolist()):
                seen.append(None if ended[b] else token)
                if token in self.stops or step >= room[b]:
                    ended[b] = True
            yield seen

            if all(ended):
                return
            logits_BV = self.model.decode(tokens_B, cache)

    def prefill(self, prompts: list[list[int]], steps: int) -> tuple[torch.Tensor, KVCache]:
        """(logits_BV after each prompt, a cache with all of them and room for `steps` more)."""
        weight = self.model.lm_head.weight
        # pack wants tokens and loss weights; nothing is learned here, so these are 0
        rows = [(np.array(ids), np.zeros(len(ids))) for ids in prompts]
        batch = pack(rows).to(weight.device)

        longest = max(len(ids) for ids in prompts)
        slots = longest + steps
        cache = KVCache(self.model.config, len(prompts), slots, weight.device, weight.dtype)
        logits_BV = self.model.prefill(batch.tokens_T, batch.positions_T, batch.cu_seqlens, cache)
        return logits_BV, cache

    def answer(
        self,
        prompts: list[list[int]],
        config: SampleConfig,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """The answers to B prompts, made side by side."""
        steps = list(self.generate(prompts, config, numbers))
        answers = []
        for b in range(len(prompts)):
            ids = [step[b] for step in steps if step[b] is not None]
            answers.append(self.ended(ids))
        return answers

    def ended(self, ids: list[int]) -> Answer:
        """The answer that these generated ids are."""
        if ids[-1] in self.stops:
            return Answer(ids[:-1], "stop")
        return Answer(ids, "length")

    def answer_each(
        self, prompts: list[list[int]], config: SampleConfig, kept: Part | None = None
    ) -> Iterator[tuple]:
        """Yield (index, Answer) for any number of prompts, batch by batch, with a progress bar.

        kept: answers of before, which are not made again, and where new ones are written. Batches
        and random numbers are what they would be without it.
        """
        numbers = self.numbers(len(prompts))
        # prompts of like length share a batch, so that the cache has few empty slots
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        tokens = 0
        began = time.monotonic()
        with tqdm(total=len(prompts), unit=" prompts", disable=None) as bar:
            for start in range(0, len(order), config.batch):
                indices = order[start : start + config.batch]
                found = kept.find(indices) if kept else None
                if found:
                    answers = [Answer(*answer) for answer in found]
                else:
                    mine = [prompts[i] for i in indices]
                    try:
                        answers = self.answer(mine, config, [numbers[i] for i in indices])
                    except torch.OutOfMemoryError:
                        raise ValueError(too_large(mine, kept)) from None
                    if kept:
                        kept.add(indices, answers, [self.text(answer.ids) for answer in answers])
                    tokens += sum(len(answer.ids) for answer in answers)
                seconds = time.monotonic() - began
                bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s")
                bar.update(len(indices))
                yield from zip(indices, answers)

    def answer_all(
        self, prompts: list[list[int]], config: SampleConfig, kept: Part | None = None
    ) -> list[Answer]:
        """The answers to any number of prompts, in their order."""
        answers = dict(self.answer_each(prompts, config, kept))
        return [answers[i] for i in range(len(prompts))]

    @property
    def identity(self) -> dict:
        """What answers depend on beside the prompts and how they are drawn, for KeptAnswers."""
        return {
            "model": model_digest(self.folder),
            "template": self.template,
            "condition": self.condition,
            "device": str(self.model.lm_head.weight.device),
        }

    def mean_logprobs(
        self, prompts: list[list[int]], answers: list[Answer], batch: int
    ) -> list[float]:
        """Of each answer, after its prompt: 1/n sum of log pi(y_i | x, c, y_1 .. y_i-1), in nats.

        The n tokens are those of the answer and, if the model ended it ("stop"), the
        `<|end_of_turn|>` that training has behind every answer (also where `</s>` ended it). So
        this is minus the mean loss that training would have on the answer: at temperature 1 and
        over the whole vocabulary, however the answer was drawn. The softmax is fp32. A pass
        computes `batch` answers.
        """
        means = []
        for start in range(0, len(prompts), batch):
            end = start + batch
            means += self.mean_logprobs_of_batch(prompts[start:end], answers[start:end])
        return means

    @torch.no_grad()
    def mean_logprobs_of_batch(
        self, prompts: list[list[int]], answers: list[Answer]
    ) -> list[float]:
        """mean_logprobs in one pass: prompts and answers are packed as conversations in training,
        with weight 1 on the answers."""
        rows = []
        counts = []
        for prompt, answer in zip(prompts, answers):
            end = [self.tokenizer.eot] if answer.finish == "stop" else []
            said = answer.ids + end
            weights = np.repeat([0.0, 1.0], [len(prompt), len(said)])
            rows.append((np.array(prompt + said), weights))
            counts.append(len(said))

        batch = pack(rows).to(self.model.lm_head.weight.device)
        losses = self.model(*batch.inputs)
        # only the rows that predict an answer's tokens are left, one answer after another
        nll_R = losses.nll_T[batch.rows_R]
        return [-nll_n.mean().item() for nll_n in nll_R.split(counts)]


def uniforms(seed: int, numbers: Sequence[int], steps: int) -> torch.Tensor:
    """fp32 [steps, B], from 0 to below 1: the random numbers of B prompts, a column for each.

    A column follows from the seed and the prompt's number alone: Philox, keyed by the two. More
    steps only make it longer.
    """
    columns = []
    for number in numbers:
        key = np.array([seed, number], np.uint64)
        columns.append(np.random.Generator(np.random.Philox(key=key)).random(steps, np.float32))
    return torch.from_numpy(np.stack(columns, axis=1))


def choose(logits_BV: torch.Tensor, config: SampleConfig, uniform_B: torch.Tensor) -> torch.Tensor:
    """tokens_B int64, drawn from softmax(logits / temperature).

    Only the top_k likeliest tokens, and of these the smallest set of mass top_p, can be drawn.
    uniform_B: from 0 to below 1, a prompt's random number of this step.
    """
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV / config.temperature).softmax(-1)

    # Sorted, both limits are a cut on the right. The mass of the likelier tokens is 0 for the
    # likeliest, which therefore always stays.
    probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    if config.top_k:
        probs_BV[:, config.top_k :] = 0
    mass_BV = probs_BV.cumsum(-1)
    probs_BV[mass_BV - probs_BV >= config.top_p] = 0

    # What is left has the mass of its last token, total. The token drawn is where the mass passes
    # a random share of that: each token is met as often as its own part of the mass is wide.
    mass_BV = probs_BV.cumsum(-1)
    total_B1 = mass_BV[:, -1:].contiguous()
    pick_B1 = torch.searchsorted(mass_BV, uniform_B[:, None] * total_B1, right=True)
    # rounded up to the total, a share points behind the last token that has any mass
    last_B1 = torch.searchsorted(mass_BV, total_B1)
    tokens_B1 = order_BV.gather(1, pick_B1.minimum(last_B1))
    return tokens_B1[:, 0]


# ---- the terminal


def say(speaker: Speaker, ids: list[int], config: SampleConfig) -> Answer:
    """Stream one answer to the terminal, and return it."""
    answer = []
    shown = ""
    for (token,) in speaker.generate([ids], config):
        if token is not None:
            answer.append(token)
        # A character may be several tokens, a byte each: until the last is there, the text ends
        # in the replacement character, and we wait.
        text = speaker.text(answer)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = speaker.text(answer)
    print(text[len(shown) :])
    return speaker.ended(answer)


def chat(speaker: Speaker, config: SampleConfig) -> None:
    """Turns read from the terminal, each answered with all turns before it in the prompt."""
    print(
        f"condition {speaker.condition or '-'}, template {speaker.template}; "
        "an empty line or Ctrl-D ends the chat"
    )
    # what is typed may be no UTF-8: it is taken as it is, and mended below
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    messages = []
    mended_before = False
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        typed = line
        line = typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if line != typed and not mended_before:
            print("not all of that is UTF-8: U+FFFD stands for the rest", file=sys.stderr)
            mended_before = True
        messages.append(Message("user", line))
        ids = speaker.ids(messages, config.system, config.truncate_left, config.max_new)
        answer = say(speaker, ids, config)
        messages.append(Message("assistant", speaker.text(answer.ids)))


# ---- files


def read_prompts(path: str, system: str | None) -> tuple[list[dict], list[tuple]]:
    """(rows, [(messages, system)]) of an --input file. A row's own system text goes first."""
    rows = []
    prompts = []
    for where, row in read_rows(path):
        conversation = prompt_of(row, where)
        own = conversation.system
        rows.append(row)
        prompts.append((conversation.messages, system if own is None else own))
    if not rows:
        raise ValueError(
            f'{path}: no prompts; each line is a {{"prompt": ..}} or {{"messages": [..]}}'
        )
    return rows, prompts


def prompt_of(row: object, where: str) -> Conversation:
    """A row of --input as a conversation, which ends with a user's message."""
    # {"prompt": ..} is short for a conversation of one message
    is_prompt = isinstance(row, dict) and isinstance(row.get("prompt"), str)
    if is_prompt and first_of(row, TURN_KEYS) is None:
        row = {"messages": [{"role": "user", "content": row["prompt"]}]}
    if not isinstance(row, dict) or first_of(row, TURN_KEYS) is None:
        raise ValueError(
            f'{where}: a prompt is {{"prompt": "text"}}, or {{"messages": [{{"role": "user", '
            f'"content": "text"}}, ..]}}; the row has neither, mend it'
        )
    conversation = parse(row, where)
    if conversation.messages[-1].role != "user":
        raise ValueError(
            f"{where}: the last message is not the user's, so there is nothing to answer; remove it"
        )
    return conversation


def ids_of_prompts(speaker: Speaker, prompts: list[tuple], config: SampleConfig) -> list[list[int]]:
    """The ids of all prompts of --input. ValueError: one is too long; the message has its row."""
    ids = []
    for number, (messages, system) in enumerate(prompts, 1):
        try:
            ids.append(speaker.ids(messages, system, config.truncate_left, config.max_new))
        except ValueError as error:
            raise ValueError(f"{config.input}: row {number}: {error}") from None
    return ids


def response_of(speaker: Speaker, answer: Answer) -> dict:
    """An answer as a row of --output has it."""
    return {"response": speaker.text(answer.ids), "finish": answer.finish}


def answer_file(speakers: dict[str, Speaker], config: SampleConfig) -> None:
    """--input to --output: the same rows in the same order, each with its response; with several
    conditions, with the responses under all of them.

    speakers: {the name in --condition: a speaker under that condition}.
    """
    check_out(config.output, config.input)
    # every prompt is checked before the first answer is made
    rows, prompts = read_prompts(config.input, config.system)
    ids = {}
    for name, speaker in speakers.items():
        ids[name] = ids_of_prompts(speaker, prompts, config)

    first = next(iter(speakers.values()))
    with KeptAnswers(config.output, run_of(first, rows, config), first.vocab_size) as kept:
        responses = {}
        for name, speaker in speakers.items():
            answers = speaker.answer_all(ids[name], config, kept.part(name))
            responses[name] = [response_of(speaker, answer) for answer in answers]
            if len(speakers) > 1:
                add_logprobs(responses[name], answers, speakers, ids, config)

        with written_whole(config.output) as partial, open(partial, "w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                of_row = {name: of_name[i] for name, of_name in responses.items()}
                only, *others = of_row.values()
                added = {"responses": of_row} if others else only
                file.write(json.dumps(row | added, ensure_ascii=False) + "\n")
    count = f"{len(rows)} x {len(speakers)}" if len(speakers) > 1 else f"{len(rows)}"
    print(f"{count} answers in {config.output}", file=sys.stderr)


def run_of(speaker: Speaker, rows: list[dict], config: SampleConfig) -> dict:
    """What the answers of --input depend on: another command is not continued as this one."""
    flags = dataclasses.asdict(config)
    for name in ("folder", "prompt", "input", "output"):
        del flags[name]
    # the flags go last: several conditions are named there
    return speaker.identity | {"prompts": rows_sha256(rows)} | flags


def add_logprobs(
    responses: list[dict],
    answers: list[Answer],
    speakers: dict[str, Speaker],
    ids: dict[str, list[list[int]]],
    config: SampleConfig,
) -> None:
    """To each response its mean log-probability under every condition.

    answers: those of the responses. ids: the prompts under every condition.
    """
    for response in responses:
        response["logprob"] = {}
    for name, speaker in speakers.items():
        logprobs = speaker.mean_logprobs(ids[name], answers, config.batch)
        for response, logprob in zip(responses, logprobs):
            response["logprob"][name] = round(logprob, 4)


# ---- side by side: several conditions of one model (Fig. 5)


def compare_prompt(speakers: dict[str, Speaker], config: SampleConfig) -> None:
    """--prompt under each condition, then a table: each answer's mean log-probability under each.

    speakers: {the name in --condition: a speaker under that condition}.
    """
    question = [Message("user", config.prompt)]
    ids = {}
    for name, speaker in speakers.items():
        ids[name] = speaker.ids(question, config.system, config.truncate_left, config.max_new)

    logprobs = {}
    for name, speaker in speakers.items():
        print(f"under {name}:")
        answer = say(speaker, ids[name], config)
        print()
        logprobs[name] = {}
        for other in speakers:
            (logprob,) = speaker.mean_logprobs([ids[other]], [answer], batch=1)
            logprobs[name][other] = logprob
    print_logprobs(logprobs)


def print_logprobs(logprobs: dict[str, dict[str, float]]) -> None:
    """The table of {answered under: {prompt: mean log-probability}}, a line for each answer."""
    title = "mean log-probability of a token"
    answers = {name: f"answer under {name}" for name in logprobs}
    prompts = {name: f"{name} prompt" for name in logprobs}
    left = max(map(len, [title, *answers.values()]))
    right = max(map(len, prompts.values()))

    head = "".join(f"  {prompt:>{right}} " for prompt in prompts.values())
    print(f"{title:{left}}{head}".rstrip())
    for name, row in logprobs.items():
        likeliest = max(row, key=row.get)
        line = f"{answers[name]:{left}}"
        for other, logprob in row.items():
            mark = "*" if other == likeliest else " "
            line += f"  {logprob:{right}.3f}{mark}"
        print(line.rstrip())
    print("* the prompt under which the answer is likeliest")


def compare(names: list[str], config: SampleConfig) -> None:
    """Answers under each of these conditions.

    Each condition draws from random numbers of its own, with the same seed. So its answers are
    those that --condition gives with it alone, in whichever order the names are.
    """
    if config.prompt is None and not config.input:
        # after one turn the histories differ in more than the condition: nothing to compare
        raise ValueError(
            f"--condition {','.join(names)} answers a --prompt or an --input; "
            "a chat goes on from one answer, so name one condition"
        )
    training = read_training(model_folder(config.folder[0]))
    check_comparison(names, choose_template(config.template, training), training)

    first = Speaker(config.folder[0], names[0], config.template, seed=config.seed)
    speakers = {}
    for name in names:
        speakers[name] = first.under(choose_condition(name, training), config.seed)
    if config.prompt is not None:
        compare_prompt(speakers, config)
    else:
        answer_file(speakers, config)
    # the prompt with the longest condition is cut wherever another is
    report_cut(max(speaker.cut for speaker in speakers.values()))


# ---- the command


def too_large(prompts: list[list[int]], kept: Part | None) -> str:
    """What to do where a GPU has too little memory for a batch."""
    longest = max(len(prompt) for prompt in prompts)
    line = (
        f"the GPU is out of memory, with {len(prompts)} prompts of up to {longest} tokens at once; "
        "lower --batch or --max_new"
    )
    if kept and kept.kept.answers:
        # answers depend on both: batches are rounded in their own way
        line += f", and remove {kept.kept.path}, whose answers are of the old ones"
    return line


def report_cut(cut: int) -> None:
    if cut:
        print(f"{cut} prompts cut on the left", file=sys.stderr)


def main(argv: list[str]) -> None:
    """One prompt, a file of prompts, or a chat."""
    config = parse_args(SampleConfig, argv, positional="folder")
    if len(config.folder) != 1:
        raise ValueError(
            "give one model directory: "
            "python sample.py DIR [--prompt TEXT | --input FILE --output FILE]"
        )
    if bool(config.input) != bool(config.output):
        raise ValueError("--input and --output go together")
    if config.input and config.prompt is not None:
        raise ValueError("--prompt is one question and --input a file of them; give one of the two")
    check_sampling(config)

    training = read_training(model_folder(config.folder[0]))
    names = split_conditions(config.condition, training)
    if len(names) > 1:
        compare(names, config)
        return

    speaker = Speaker(config.folder[0], config.condition, config.template, seed=config.seed)
    if config.prompt is not None:
        question = [Message("user", config.prompt)]
        ids = speaker.ids(question, config.system, config.truncate_left, config.max_new)
        say(speaker, ids, config)
    elif config.input:
        answer_file({"": speaker}, config)
    else:
        chat(speaker, config)
    report_cut(speaker.cut)


if __name__ == "__main__":
    run(main)
