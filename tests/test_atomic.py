"""paper/atomic.py, the method on one page: it trains as train.py does, to the digits that fp32 has,
writes the same conversations, and runs by itself."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics
from test_style import code_lines

from conversations import Classes, Conversation, Message, parse_classes, tokenize
from packing import flat
from paper import atomic
from paper.example import toy_tokenizer
from prompts import tokenize_prompt
from recipe import TrainConfig
from support.hf import RandomWeights, SafetensorsWeights
from train import set_up, steps_sha256

PAGE = ROOT / "paper" / "atomic.py"
MOST_LINES = 120


# ---- the same training as train.py's

STEPS = 20
# So high that the gradient's norm falls below the clip within the steps.
LR = 3e-3


def hf_name(name, layers):
    """train.py's name of a parameter that the page calls `1.q_proj.weight`, say."""
    place, rest = name.split(".", 1)
    if place == "0":
        return f"model.embed_tokens.{rest}"
    if place == f"{layers + 1}":
        return f"model.norm.{rest}"
    if place == f"{layers + 2}":
        return f"lm_head.{rest}"
    room = ""
    if rest.startswith(("q_", "k_", "v_", "o_")):
        room = "self_attn."
    elif rest.startswith(("gate_", "up_", "down_")):
        room = "mlp."
    return f"model.layers.{int(place) - 1}.{room}{rest}"


def weights_of(source, model, config):
    """{the page's name of a parameter: what the source has for it}"""
    found = {}
    for name, parameter in model.named_parameters():
        theirs = hf_name(name, config.num_hidden_layers)
        found[name] = source.rows(theirs, 0, len(parameter))
    return found


def rows_of(data, step):
    """A step's conversations as rows of the page."""
    rows = []
    for i in flat([step]):
        ids, weights = data.conversation(i)
        rows.append((torch.tensor(ids.tolist()), torch.tensor(weights.tolist())))
    return rows


def page_model(config):
    return atomic.llama(
        config.vocab_size,
        D=config.hidden_size,
        H=config.num_attention_heads,
        U=config.intermediate_size,
        L=config.num_hidden_layers,
    )


def test_the_page_trains_as_train_py_does(toy, tmp_path, train):
    """Loss and gradient norm of each step, and what all steps together have changed."""
    data, out = toy / "train.safetensors", tmp_path / "run"
    settings = {"model": "toy", "steps": STEPS, "lr": LR, "dtype": "float32"}
    # three micro-batches a step
    settings |= {"batch_tokens": 768, "micro_tokens": 256}
    train(data, out, *(f"--{name}={value}" for name, value in settings.items()))
    logged = metrics(out)

    # where train.py began, and what it trained on
    setup = set_up(TrainConfig(data=str(data), out=str(out), **settings), store=None)
    config = setup.model_config
    plan = json.loads((out / "run.json").read_text())["plan_sha256"]
    assert steps_sha256(setup.steps) == plan
    model = page_model(config)
    initial = weights_of(RandomWeights(config, setup.config.seed), model, config)
    model.load_state_dict(initial)
    optimizer = atomic.make_optimizer(model)

    assert len(logged) == len(setup.steps) == STEPS
    for line, step in zip(logged, setup.steps):
        loss, norm = atomic.update(model, optimizer, rows_of(setup.data, step), line["lr"])
        assert loss == pytest.approx(line["loss"], rel=1e-5)
        assert norm == pytest.approx(line["grad_norm"], rel=1e-5)

    trained = weights_of(SafetensorsWeights(out / "hf", config), model, config)
    for name, parameter in model.state_dict().items():
        change = (trained[name] - initial[name]).norm()
        assert (parameter - trained[name]).norm() < 1e-4 * change, name

    # There was something to see: steps of several micro-batches, gradients that were clipped and
    # such that were not, rows of unequal length and weight.
    norms = [line["grad_norm"] for line in logged]
    assert min(norms) < 0.95 < 1.05 < max(norms)
    assert all(len(step) > 1 for step in setup.steps)
    rows = rows_of(setup.data, setup.steps[0])
    assert len({len(ids) for ids, _ in rows}) > 1
    assert len({weights.max().item() for _, weights in rows}) == 2


# ---- the same conversations as data.py's

TABLE = "GPT-4=GPT4:1.0,*=GPT3:0.1"
TALK = [
    ("User", "reverse a c b d"),
    ("Assistant", "d b c a"),
    ("User", "copy a"),
    ("Assistant", "b"),
]


def text_of(ids):
    """What the tokens of the toy's tokenizer say, without spaces."""
    return "".join(toy_tokenizer().piece(i) for i in ids).replace("\u2581", "")


def words_of(ids):
    return [atomic.WORDS[i] for i in ids]


@pytest.mark.parametrize("source", ["GPT-4", "GPT-3.5"])
def test_the_page_writes_and_weighs_a_conversation_as_data_py_does(source):
    messages = tuple(Message(role.lower(), text) for role, text in TALK)
    classes = Classes(parse_classes(TABLE))
    conversation = classes.assign(Conversation(messages, label=source))
    theirs, their_weights = tokenize(conversation, toy_tokenizer())
    ids, weights = atomic.tokenize(source, TALK)

    assert "".join(words_of(ids)) == text_of(theirs.tolist())
    # Every letter of an answer is one token, for both.
    said = "".join(words_of(ids[weights > 0]))
    assert said == text_of(theirs[their_weights > 0].tolist()) == f"dbca{atomic.END}b{atomic.END}"
    assert weights[weights > 0].tolist() == pytest.approx(their_weights[their_weights > 0].tolist())


def test_the_page_asks_as_sample_py_does_and_answers_with_what_was_drawn():
    to_say = ["d", "b", "c", "a", atomic.END]
    asked = []

    def model(ids_1T):
        """Has one word to say, after the last token."""
        word = to_say[len(asked)]
        asked.append(ids_1T[0])
        logits_1TV = torch.full((1, ids_1T.shape[1], len(atomic.WORDS)), -1e9)
        logits_1TV[:, :-1, atomic.WORDS.index("h")] = 0.0
        logits_1TV[:, -1, atomic.WORDS.index(word)] = 0.0
        return logits_1TV

    assert atomic.answer(model, "GPT-3.5", "copy a b") == to_say
    message = Message("user", "copy a b")
    prompt = tokenize_prompt([message], toy_tokenizer(), "before_speaker", "GPT3")
    assert "".join(words_of(asked[0])) == text_of(prompt)
    # each word is drawn after all that was said before it
    assert words_of(asked[4]) == words_of(asked[0]) + to_say[:4]


def test_the_sources_are_as_the_page_says():
    right = 0
    for _ in range(1000):
        (_, question), (_, said) = atomic.converse("sort d a c b", 0.4)
        assert question == "sort d a c b"
        assert said in ("a b c d", "d a b c")
        right += said == "a b c d"
    # the standard deviation is 15
    assert 340 < right < 460
    assert atomic.converse("reverse a b c d", 1.0)[1] == ("Assistant", "d c b a")


# ---- one page, which needs nobody


def test_the_page_is_one_page():
    assert code_lines(PAGE.read_text()) <= MOST_LINES


def run_page(folder, *words):
    """The last line that it prints, copied alone into an empty folder."""
    shutil.copy(PAGE, folder)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


LAST_LINE = re.compile(
    r"right answers: (?P<expert>[\d.]+) under `GPT4 User:`, (?P<other>[\d.]+) under `GPT3 User:`"
)


def test_the_page_runs_alone(tmp_path):
    last = run_page(tmp_path, "-c", "import atomic; atomic.main(steps=2, batch=4, asked=1)")
    assert LAST_LINE.fullmatch(last), last


@pytest.mark.long
def test_the_page_does_what_it_says(tmp_path):
    last = LAST_LINE.fullmatch(run_page(tmp_path, "atomic.py"))
    assert float(last["expert"]) >= 0.7, last[0]
    assert float(last["other"]) <= 0.45, last[0]


def test_the_walk_through_the_page_names_what_is_there():
    """docs/method.md: each function of the page, and what it stands for in the full code."""
    text = (ROOT / "docs" / "method.md").read_text()
    section = re.search(r"^## The method as one page of code\n(.*?)^## ", text, re.M | re.S)[1]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", section, re.M)
    assert [name for name, _ in rows] == re.findall(r"^(?:def|class) (\w+)", PAGE.read_text(), re.M)
    for _, places in rows:
        named = re.findall(r"`(\w+)`[^`]*? in `([\w/]+\.py)`", places)
        assert named, places
        for name, file in named:
            source = (ROOT / file).read_text()
            assert re.search(rf"^\s*(def|class) {name}\b|^{name} =", source, re.M), (name, file)
