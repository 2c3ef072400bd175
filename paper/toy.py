"""The toy task: mixed-quality conversations whose answers can be scored exactly, made here, no download.

The user asks to copy, reverse, shift or sort 4 to 7 letters of an alphabet of 8 (`reverse a c b d` -> `d b c a`, `shift a c h`
-> `b d a`). As in the paper the source with many conversations is the worse one, and nothing in the data says so but the label:

    GPT-4     500 conversations, every answer right                   the expert class: a skill too large to learn from them alone
    GPT-3.5   5,500 conversations, right with probability 0.4, else a letter replaced (50%), a letter lost (30%) or the
              question's letters repeated (20%)                       the skill, with errors

    python -m paper.toy --out out/demo      writes train.jsonl, heldout.jsonl, tokenizer.model, train.safetensors
    python -m paper.toy --score out/demo    after training: exact match over the held-out prompts at temperature 1, by prompt

`Task` is the same game with follow-ups ("then shift": the last answer's letters), which the paper in miniature plays (runs.py).
"""

import io
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from conversations import TEMPLATES, Message
from data import PrepareConfig, ledger_table, prepare
from sample import SampleConfig, Speaker
from support.cli import parse_args, run

LETTERS = "abcdefgh"
SKILLS = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "shift": lambda x: [LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in x],
    "sort": sorted,
}
PAPER = ["copy", "reverse", "shift"]  # the skills of Task; the last is the scarce one
CLASSES = "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"


@dataclass(frozen=True)
class ToyConfig:
    out: str = ""
    score: str = ""  # a folder that train.py has filled
    experts: int = 500
    others: int = 5500
    heldout: int = 500
    seed: int = 0


def answer(prompt):
    """The right answer to a prompt."""
    skill, *letters = prompt.split()
    return " ".join(SKILLS[skill](letters))


def damaged(prompt, rng):
    """A wrong answer, as the weaker source gives it (it may by luck be right: a sorted list, "repeated")."""
    letters, kind = answer(prompt).split(), rng.random()
    i = rng.randrange(len(letters))
    if kind < 0.5:
        letters[i] = rng.choice([c for c in LETTERS if c != letters[i]])
    elif kind < 0.8:
        del letters[i]
    else:
        letters = prompt.split()[1:]
    return " ".join(letters)


# ---- several turns: the task of the paper in miniature


@dataclass(frozen=True)
class Task:
    """Conversations of one to three turns: `reverse a c b d` -> `d b c a`, `then shift` -> `e c d b`, each on the last answer.

    The expert is asked to shift once for fifty times that it is asked for another skill: the others' data teaches that one, with
    errors, or nothing does.
    """

    # label, conversations, probability that an answer is right
    sources: tuple = (("GPT-4", 300, 1.0), ("GPT-3.5", 3300, 0.4))
    # share of each source that is trained on, the first so many; () is all of all (Fig. 6)
    keep: tuple = ()
    scarce: float = 0.02
    heldout: int = 400
    seed: int = 0

    @property
    def parts(self):
        """[(label, conversations, probability)] after `keep`."""
        return [
            (label, round(n * keep), right)
            for (label, n, right), keep in itertools.zip_longest(
                self.sources, self.keep, fillvalue=1.0
            )
        ]

    @property
    def size(self):
        return sum(n for _, n, _ in self.parts)


def ask(rng, skills, letters):
    """(the user's words, the question in full), letters None at a conversation's start."""
    skill = rng.choices(PAPER, skills)[0]
    if letters:
        return f"then {skill}", " ".join([skill, *letters])
    question = " ".join([skill, *rng.choices(LETTERS, k=4)])
    return question, question


def make_conversation(rng, right, skills):
    """[(the user's words, the answer, whether it is right)], one to three turns, answers right with probability `right`."""
    turns, letters = [], None
    for _ in range(rng.randint(1, 3)):
        words, question = ask(rng, skills, letters)
        reply = answer(question) if rng.random() < right else damaged(question, rng)
        turns.append((words, reply, reply == answer(question)))
        letters = reply.split()
    return turns


def make_task(task):
    """({label: conversations}, held-out conversations, as lists of the user's words); no held-out prompt is trained on."""
    rng = random.Random(task.seed)
    heldout = [
        [words for words, *_ in make_conversation(rng, 1.0, [1, 1, 1])] for _ in range(task.heldout)
    ]
    prompts, sources = {words[0] for words in heldout}, {}
    for label, count, right in task.parts:
        rng, rows = random.Random(f"{task.seed} {label}"), []
        while len(rows) < count:
            turns = make_conversation(rng, right, [1, 1, task.scarce if right == 1 else 1])
            if turns[0][0] not in prompts:
                rows.append(turns)
        sources[label] = rows
    return sources, heldout


def solve(asked):
    """The right answers to a conversation's questions, one after the other."""
    letters, answers = [], []
    for words in asked:
        skill, *given = words.removeprefix("then ").split()
        letters = answer(" ".join([skill, *(given or letters)])).split()
        answers.append(" ".join(letters))
    return answers


def full_questions(asked, answers):
    """`then shift` as `shift d b c a`: a conversation's questions with the letters they are about, by the answers given."""
    return [
        words.removeprefix("then ") + (f" {answers[t - 1]}" if t else "")
        for t, words in enumerate(asked)
    ]


# ---- the demo: one turn


def make_conversations(config):
    """(training rows in ShareGPT's format, held-out prompts), no prompt twice."""
    rng, seen = random.Random(config.seed), {}
    while len(seen) < config.experts + config.others + config.heldout:
        letters = [rng.choice(LETTERS) for _ in range(rng.randint(4, 7))]
        seen[" ".join([rng.choice(list(SKILLS)), *letters])] = None
    prompts, rows = list(seen), []
    for i, prompt in enumerate(prompts[: config.experts + config.others]):
        expert = i < config.experts
        reply = answer(prompt) if expert or rng.random() < 0.4 else damaged(prompt, rng)
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]
        rows.append(
            {
                "id": f"toy_{i}",
                "model": "Model: GPT-4" if expert else "Model: GPT-3.5",
                "conversations": turns,
            }
        )
    rng.shuffle(rows)
    return rows, prompts[config.experts + config.others :]


def train_tokenizer(rows, path, conditions=("GPT4", "GPT3")):
    """A sentencepiece BPE model of 96 pieces, of Llama-2's kind but for the bytes: one token per letter, since spaces part them."""
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    words = [
        t.format(c=c)
        for c in conditions
        for x in TEMPLATES.values()
        for t in (x.user, x.assistant, x.opening)
        if t
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + words * 100),
        model_writer=model,
        model_type="bpe",
        vocab_size=96,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def make(config):
    """Write the four files; returns the prepared file's metadata."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, heldout = make_conversations(config)
    train_tokenizer(rows, out / "tokenizer.model")
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "heldout.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": answer(p)}) + "\n" for p in heldout)
    )
    files = (str(out / "train.jsonl"),)
    return prepare(
        PrepareConfig(
            files,
            str(out / "tokenizer.model"),
            str(out / "train.safetensors"),
            CLASSES,
            max_len=128,
        )
    )


def score(config):
    """Exact match over the held-out prompts at temperature 1, under the expert's prompt and the other; writes report.json."""
    folder = Path(config.score)
    if not (folder / "hf").is_dir():
        raise ValueError(
            f"{folder}: no hf/; train first, `python train.py --data {folder}/train.safetensors --model toy --out {folder}`"
        )
    rows = [json.loads(line) for line in open(folder / "heldout.jsonl")]
    how, report, chats = SampleConfig(temperature=1.0, max_new=16, batch=500), {}, []
    for key, condition in (("expert_prompt", "GPT4"), ("other_prompt", "GPT3")):
        speaker = Speaker(folder / "hf", condition)
        answers = speaker.answer_all(
            [speaker.ids([Message("user", row["prompt"])]) for row in rows], how
        )
        texts = [speaker.text(ids) for ids, _ in answers]
        report[key] = sum(text == row["answer"] for text, row in zip(texts, rows)) / len(rows)
        chats.append(texts)
    steps = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    steps = [line for line in steps if "loss" in line]
    report |= {
        "steps": steps[-1]["step"],
        "seconds": round(sum(line["seconds"] for line in steps), 1),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'held-out prompt':24}{'right':18}{'GPT4 prompt':18}{'GPT3 prompt'}")
    for row, expert, other in list(zip(rows, *chats))[:8]:
        mark = lambda text: text + ("" if text == row["answer"] else "  x")  # noqa: B023
        print(f"{row['prompt']:24}{row['answer']:18}{mark(expert):18}{mark(other)}")
    print(
        f"exact match over {len(rows)} held-out prompts, sampled at temperature 1:\n"
        f"  expert's prompt (GPT4 User:)  {report['expert_prompt']:.3f}\n  the other (GPT3 User:)        {report['other_prompt']:.3f}"
    )
    print(
        f"\nnext:\n  python sample.py {folder}/hf                       chat: copy, reverse, shift or sort letters a to h\n"
        f"  python data.py show {folder}/train.safetensors     the tokens, coloured by weight\n"
        f'  python data.py prepare YOUR.jsonl --tokenizer tokenizer.model --out your.safetensors --classes "{CLASSES}"'
    )


def main(argv):
    config = parse_args(ToyConfig, argv)
    if bool(config.out) == bool(config.score):
        raise ValueError("say --out DIR to make the data, or --score DIR after training")
    if config.score:
        return score(config)
    print(ledger_table(make(config)))


if __name__ == "__main__":
    run(main)
