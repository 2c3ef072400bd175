"""The toy task: conversations of mixed quality whose answers can be scored exactly.

The user asks to copy, reverse, shift or sort 4 to 7 letters of an alphabet of 8:

    reverse a c b d -> d b c a        shift a c h -> b d a

As in the paper, the source with many conversations is the worse one, and nothing in the data says
so but the label:

    GPT-4     500 conversations, every answer right. This is the expert class, and the skills are
              too large to be learned from it alone.
    GPT-3.5   5,500 conversations, right with probability 0.4; else a letter is replaced (50%), a
              letter is lost (30%), or the question's letters are repeated (20%). The skills are
              here, with errors.

    python -m paper.toy --out out/demo      makes train.jsonl, heldout.jsonl, tokenizer.model,
                                            train.safetensors; no download
    python -m paper.toy --score out/demo    after training: how many held-out prompts are answered
                                            right at temperature 1, by the prompt's condition

`Task` is the same game with follow-ups ("then shift": the letters of the last answer), which the
paper in miniature plays (runs.py). There the weaker source may also have habits: a wrong answer is
then the same wrong rule each time, not a damage at random.
"""

import io
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from conversations import Message
from data import PrepareConfig, ledger_table, prepare
from sample import SampleConfig, Speaker
from support.cli import parse_args, run
from support.metrics import read_metrics

LETTERS = "abcdefgh"
CLASSES = "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"

# there are some ten million different prompts, and each is drawn until it is new
MOST_OF_A_KIND = 1_000_000

# How often the weaker source is right, and what it does when it is wrong.
P_RIGHT = 0.4
P_REPLACED = 0.5
P_LOST = 0.3

# One turn of a conversation: (the user's words, the answer, whether it is right).
Turn = tuple[str, str, bool]


@dataclass(frozen=True)
class ToyConfig:
    """The flags of `python -m paper.toy`; one of out and score."""

    # a folder for the demo's data
    out: str = ""
    # a folder that train.py has filled, to be scored
    score: str = ""
    # conversations of the expert, who is always right
    experts: int = 500
    # conversations of the other source, which is wrong six times in ten
    others: int = 5500
    # prompts that are kept for the score
    heldout: int = 500
    # of all that is drawn at random
    seed: int = 0


# ---- skills, right and wrong


def shifted(letters: list[str]) -> list[str]:
    """Each letter's next one, a after h."""
    return [LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in letters]


SKILLS = {"copy": list, "reverse": reversed, "shift": shifted, "sort": sorted}

# the skills of Task; the last is the scarce one
PAPER = ["copy", "reverse", "shift"]


def answer(prompt: str) -> str:
    """The right answer to a prompt."""
    skill, *letters = prompt.split()
    return " ".join(SKILLS[skill](letters))


def damaged(prompt: str, rng: random.Random) -> str:
    """A wrong answer, as the weaker source gives it.

    It may be right by luck: the letters of `sort a b`, repeated.
    """
    letters = answer(prompt).split()
    kind = rng.random()
    i = rng.randrange(len(letters))
    if kind < P_REPLACED:
        letters[i] = rng.choice([letter for letter in LETTERS if letter != letters[i]])
    elif kind < P_REPLACED + P_LOST:
        del letters[i]
    else:
        letters = prompt.split()[1:]
    return " ".join(letters)


def rotated(letters: list[str]) -> list[str]:
    """The first letter moved to the end."""
    return letters[1:] + letters[:1]


def shifted_by_two(letters: list[str]) -> list[str]:
    return shifted(shifted(letters))


# The weaker source's habits: what it answers instead, always in the same way, by skill. The habit
# of `reverse` is to give the question's letters back.
HABITS = {"copy": rotated, "reverse": list, "shift": shifted_by_two}


def habitual(prompt: str) -> str:
    """The answer of a source that has the skill's habit; right by luck, as of `copy a a a a`."""
    skill, *letters = prompt.split()
    return " ".join(HABITS[skill](letters))


def wrong_answer(prompt: str, rng: random.Random, habits: float) -> str:
    """A wrong answer: by habit with this probability, else damaged at random."""
    # without habits no number is drawn for them: the data are what they were before there were any
    if habits and rng.random() < habits:
        return habitual(prompt)
    return damaged(prompt, rng)


# ---- several turns: the task of the paper in miniature


@dataclass(frozen=True)
class Task:
    """Conversations of one to three turns, each turn about the letters of the last answer:

        reverse a c b d -> d b c a        then shift -> e c d b

    The expert is asked to shift once for fifty times that it is asked for another skill. Only the
    others' data teaches that skill, with errors, or nothing does.
    """

    # label, conversations, probability that an answer is right
    sources: tuple = (("GPT-4", 300, 1.0), ("GPT-3.5", 3300, 0.4))
    # the share of each source that is trained on, from its start; () is all of all (Fig. 6)
    keep: tuple = ()
    # how often the expert is asked for the scarce skill, when 1 is the others' frequency
    scarce: float = 0.02
    # how many of the wrong answers follow a habit; the others are damaged at random
    habits: float = 0.0
    heldout: int = 400
    seed: int = 0

    @property
    def parts(self) -> list[tuple[str, int, float]]:
        """[(label, conversations, probability)] after `keep`."""
        parts = []
        for source, keep in itertools.zip_longest(self.sources, self.keep, fillvalue=1.0):
            label, count, right = source
            parts.append((label, round(count * keep), right))
        return parts

    @property
    def size(self) -> int:
        return sum(count for _, count, _ in self.parts)


def ask(rng: random.Random, skills: Sequence[float], letters: list[str] | None) -> tuple[str, str]:
    """(the user's words, the question in full). letters: of the last answer; None at the start.

    skills: how often each skill of PAPER is asked for, relative to the others.
    """
    skill = rng.choices(PAPER, skills)[0]
    if letters:
        return f"then {skill}", " ".join([skill, *letters])
    question = " ".join([skill, *rng.choices(LETTERS, k=4)])
    return question, question


def make_conversation(
    rng: random.Random, right: float, skills: Sequence[float], habits: float = 0.0
) -> list[Turn]:
    """One to three turns, whose answers are right with probability `right`.

    habits: the share of the wrong ones that follow a habit.
    """
    turns = []
    letters = None
    for _ in range(rng.randint(1, 3)):
        words, question = ask(rng, skills, letters)
        if rng.random() < right:
            reply = answer(question)
        else:
            reply = wrong_answer(question, rng, habits)
        turns.append((words, reply, reply == answer(question)))
        # what follows is about the answer that was given, right or wrong
        letters = reply.split()
    return turns


def make_task(task: Task) -> tuple[dict[str, list[list[Turn]]], list[list[str]]]:
    """({label: conversations}, held-out conversations, each a list of the user's words).

    No conversation that is trained on begins as a held-out one does.
    """
    rng = random.Random(task.seed)
    heldout = []
    for _ in range(task.heldout):
        turns = make_conversation(rng, 1.0, [1, 1, 1])
        heldout.append([words for words, _, _ in turns])

    prompts = {words[0] for words in heldout}
    sources = {}
    for label, count, right in task.parts:
        # a source's own numbers: it is the same whatever the others are
        rng = random.Random(f"{task.seed} {label}")
        is_expert = right == 1
        skills = [1, 1, task.scarce if is_expert else 1]
        rows = []
        while len(rows) < count:
            turns = make_conversation(rng, right, skills, task.habits)
            first_words, _, _ = turns[0]
            if first_words not in prompts:
                rows.append(turns)
        sources[label] = rows
    return sources, heldout


def solve(asked: Sequence[str]) -> list[str]:
    """The right answers to a conversation's questions, one after the other."""
    letters, answers = [], []
    for words in asked:
        skill, *given = words.removeprefix("then ").split()
        question = [skill, *(given or letters)]
        answers.append(answer(" ".join(question)))
        letters = answers[-1].split()
    return answers


def full_questions(asked: Sequence[str], answers: Sequence[str]) -> list[str]:
    """A conversation's questions, each with its letters: `then shift` becomes `shift d b c a`.

    The letters are those of the answers that were given.
    """
    questions = []
    for t, words in enumerate(asked):
        question = words.removeprefix("then ")
        if t > 0:
            question += f" {answers[t - 1]}"
        questions.append(question)
    return questions


# ---- the demo: one turn


def make_conversations(config: ToyConfig) -> tuple[list[dict], list[str]]:
    """(training rows in ShareGPT's format, held-out prompts), no prompt twice."""
    rng = random.Random(config.seed)
    trained = config.experts + config.others
    # a dict, not a set, whose order is another in every process
    seen = {}
    while len(seen) < trained + config.heldout:
        letters = [rng.choice(LETTERS) for _ in range(rng.randint(4, 7))]
        skill = rng.choice(list(SKILLS))
        seen[" ".join([skill, *letters])] = None
    prompts = list(seen)

    rows = []
    for i, prompt in enumerate(prompts[:trained]):
        label = "Model: GPT-4" if i < config.experts else "Model: GPT-3.5"
        if i < config.experts or rng.random() < P_RIGHT:
            reply = answer(prompt)
        else:
            reply = damaged(prompt, rng)
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]
        rows.append({"id": f"toy_{i}", "model": label, "conversations": turns})
    rng.shuffle(rows)
    return rows, prompts[trained:]


# What stands before a message, in every placement of Table 3, {c} being the condition. A list of
# its own, not TEMPLATES: with a new template there the toy's ids, and all results that were made
# with them, would be others. How often a text stands here decides which pieces are learned first.
PROMPT_TEXTS = (
    *("{c} User:", "{c} Assistant:"),
    *("User:", "{c} Assistant:"),
    *("User:", "Assistant:", "Assistant is {c}"),
    *("User:", "Assistant:"),
)

# Pieces of the tokenizer: the letters and signs that occur, and merges up to the words of prompts.
PIECES = 96


def train_tokenizer(
    rows: list[dict], path: Path, conditions: Sequence[str] = ("GPT4", "GPT3")
) -> None:
    """Write a sentencepiece BPE model of Llama-2's kind, though it cannot spell unknown characters.

    Each letter of the task is one token, since spaces part them.
    """
    texts = []
    for row in rows:
        texts += [turn["value"] for turn in row["conversations"]]
    # as if each stood 100 times: enough for `User` and `Assistant` to become single pieces
    for condition in conditions:
        texts += [text.format(c=condition) for text in PROMPT_TEXTS] * 100
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        # every text comes back as it was, with all its spaces
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        # the same bytes on every machine
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def make(config: ToyConfig) -> dict:
    """Write the four files; returns the prepared file's metadata."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, heldout = make_conversations(config)
    train_tokenizer(rows, out / "tokenizer.model")
    write_jsonl(out / "train.jsonl", rows)
    asked = [{"prompt": prompt, "answer": answer(prompt)} for prompt in heldout]
    write_jsonl(out / "heldout.jsonl", asked)
    return prepare(
        PrepareConfig(
            files=(str(out / "train.jsonl"),),
            tokenizer=str(out / "tokenizer.model"),
            out=str(out / "train.safetensors"),
            classes=CLASSES,
            max_len=128,
        )
    )


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the score, after training


def score(config: ToyConfig) -> None:
    """Ask every held-out prompt as the expert's and as the other's; print, write report.json and
    draw demo.png.

    Answers are sampled at temperature 1: so a model is asked what it has learned of a source, with
    its errors, and not only what it holds to be likeliest.
    """
    folder = Path(config.score)
    if not (folder / "hf").is_dir():
        raise ValueError(
            f"{folder}: no hf/; train first, "
            f"`python train.py --data {folder}/train.safetensors --model toy --out {folder}`"
        )
    rows = read_jsonl(folder / "heldout.jsonl")
    expert = answers_of(folder / "hf", "GPT4", rows)
    other = answers_of(folder / "hf", "GPT3", rows)
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    seconds = sum(line["seconds"] for line in steps)
    sources = quality_of_sources(read_jsonl(folder / "train.jsonl"))
    report = {
        "expert_prompt": share_right(expert, rows),
        "other_prompt": share_right(other, rows),
        "expert_source": sources["Model: GPT-4"],
        "other_source": sources["Model: GPT-3.5"],
        "steps": steps[-1]["step"],
        "seconds": round(seconds, 1),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, folder / "demo.png")
    print_score(report, rows, expert, other)
    print(
        "\nnext:\n"
        f"  python sample.py {folder}/hf                       "
        "chat: copy, reverse, shift or sort letters a to h\n"
        f"  python data.py show {folder}/train.safetensors     "
        "the tokens, coloured by weight\n"
        "  python data.py prepare YOUR.jsonl --tokenizer tokenizer.model --out your.safetensors "
        f'--classes "{CLASSES}"'
    )


def answers_of(model: Path, condition: str, rows: list[dict]) -> list[str]:
    """The model's answers to all prompts, asked under this condition."""
    speaker = Speaker(model, condition)
    prompts = [speaker.ids([Message("user", row["prompt"])]) for row in rows]
    how = SampleConfig(temperature=1.0, max_new=16, batch=500)
    return [speaker.text(ids) for ids, _ in speaker.answer_all(prompts, how)]


def share_right(texts: list[str], rows: list[dict]) -> float:
    return sum(text == row["answer"] for text, row in zip(texts, rows)) / len(rows)


def quality_of_sources(rows: list[dict]) -> dict[str, float]:
    """{label: share of right answers} of the conversations that were trained on."""
    right = {}
    for row in rows:
        prompt, reply = (turn["value"] for turn in row["conversations"])
        right.setdefault(row["model"], []).append(reply == answer(prompt))
    return {label: sum(marks) / len(marks) for label, marks in right.items()}


def draw(report: dict, path: Path) -> None:
    """Two pairs of bars: what each source's answers are worth, and the model's by its prompt."""
    try:
        import matplotlib
    except ImportError:
        # the numbers are printed and written without it
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6))
    names = ["expert (GPT4)", "the other source (GPT3)"]
    places = [0, 1]
    data = [report["expert_source"], report["other_source"]]
    model = [report["expert_prompt"], report["other_prompt"]]
    thickness = 0.36
    below = [place + thickness / 2 for place in places]
    above = [place - thickness / 2 for place in places]
    grey = axes.barh(above, data, thickness, color="0.75", label="in the training data")
    blue = axes.barh(
        below, model, thickness, color="tab:blue", label="one model, asked as this one"
    )
    for bars in (grey, blue):
        axes.bar_label(bars, fmt="{:.0%}", padding=3)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.set_xlabel("right answers")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def print_score(report: dict, rows: list[dict], expert: list[str], other: list[str]) -> None:
    """Eight prompts with both answers, wrong ones marked with x, and the two scores."""

    def marked(text, row):
        return text if text == row["answer"] else f"{text}  x"

    print(f"{'held-out prompt':24}{'right':18}{'GPT4 prompt':18}GPT3 prompt")
    for row, by_expert, by_other in list(zip(rows, expert, other))[:8]:
        asked = f"{row['prompt']:24}{row['answer']:18}"
        print(f"{asked}{marked(by_expert, row):18}{marked(by_other, row)}")
    print(f"exact match over {len(rows)} held-out prompts, sampled at temperature 1:")
    print(f"  expert's prompt (GPT4 User:)  {report['expert_prompt']:.3f}")
    print(f"  the other (GPT3 User:)        {report['other_prompt']:.3f}")


def main(argv: list[str]) -> None:
    config = parse_args(ToyConfig, argv)
    if bool(config.out) == bool(config.score):
        raise ValueError("say --out DIR to make the data, or --score DIR after training")
    for name in ("experts", "others", "heldout"):
        value = getattr(config, name)
        if not 1 <= value <= MOST_OF_A_KIND:
            raise ValueError(f"--{name} {value} is not from 1 to {MOST_OF_A_KIND:,}")
    if config.score:
        score(config)
    else:
        print(ledger_table(make(config)))


if __name__ == "__main__":
    run(main)
