"""paper/details.py: each change does what its name says, is undone, and is in its runs' keys."""

import ast
import dataclasses
import importlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics
from safetensors.torch import load_file, save_file

import paper.details as details
import recipe
import train
from model import SIZES, Model
from packing import flat
from paper.code_hash import files_of, files_reached
from paper.commands import PaperConfig, jobs_of
from paper.details import DividedByZ, UserTrained, Variant, replaced, verdict
from paper.runs import TABLE, FineTune, make_tokenizer, prepared, tokenizer_path
from paper.toy import Task, make_task
from support.hf import RandomWeights, load_weights

SMALL = Task(sources=(("GPT-4", 20, 1.0), ("GPT-3.5", 60, 0.4)), habits=1.0, heldout=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("details") / "tokenizer.model"
    make_tokenizer(path)
    return path


def rows_of(job):
    sources, _ = make_task(job.task)
    return job.rows(sources)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """The Prepared of a job's rows, under a variant or not."""

    def prepare(name, kind=FineTune, **fields):
        job = kind(name, task=SMALL, **fields)
        return prepared(tmp_path / f"{name}.safetensors", rows_of(job), job.classes, tokenizer)

    return prepare


# ---- what has a weight, and which


def test_the_end_of_turn_is_never_trained_on(prepare):
    ours = prepare("ours")
    with replaced("no_end_of_turn"):
        data = prepare("variant")
    assert len(data) == len(ours)
    eot = data.tokenizer.eot
    for i in range(len(data)):
        tokens, weights = data.conversation(i)
        our_tokens, our_weights = ours.conversation(i)
        # after the last letter there is nothing more to learn
        assert our_tokens[-1] == eot
        assert our_weights[-1] > 0
        assert tokens.tolist() == our_tokens[:-1].tolist()
        assert not weights[tokens == eot].any()
        other = tokens != eot
        assert weights[other].tolist() == our_weights[:-1][other].tolist()
    # counted, since the loss is divided by it
    answers = sum(n["turns"] for n in ours.meta["counts"].values()) / 2
    assert ours.supervised.sum() - data.supervised.sum() == answers


def test_the_whole_text_is_trained_on(prepare):
    ours = prepare("ours")
    with replaced("whole_text"):
        data = prepare("variant")
    for i in range(len(data)):
        tokens, weights = data.conversation(i)
        assert tokens.tolist() == ours.conversation(i)[0].tolist()
        assert weights[0] == 0
        of_class = data.classes[data.class_ids[i]].weight
        assert set(weights[1:].tolist()) == {np.float32(of_class)}


def test_the_users_text_is_trained_on(prepare):
    ours = prepare("ours")
    data = prepare("variant", UserTrained)
    prefix = {}
    for role in ("User", "Assistant"):
        for class_ in data.classes:
            text = f"{class_.condition} {role}:"
            prefix[class_.name, role] = data.tokenizer.encode(text)
    for i in range(len(data)):
        tokens, weights = data.conversation(i)
        class_ = data.classes[data.class_ids[i]]
        # all but the first token and the prefixes, which are the only ones with a colon
        expected = np.full(len(tokens), np.float32(class_.weight))
        expected[0] = 0
        for ids in (prefix[class_.name, "User"], prefix[class_.name, "Assistant"]):
            for start in range(len(tokens)):
                if tokens[start : start + len(ids)].tolist() == ids:
                    expected[start : start + len(ids)] = 0
        assert weights.tolist() == expected.tolist()
        assert (weights > 0).sum() > (ours.conversation(i)[1] > 0).sum()


def answers_of(rows):
    """{(label, skill): {is right: weights}} of prepared rows, by a count of their own."""
    from paper.toy import full_questions, solve

    found = {}
    for row in rows:
        turns = row["conversations"]
        asked = [turn["value"] for turn in turns[::2]]
        replies = [turn["value"] for turn in turns[1::2]]
        for turn, question in zip(turns[1::2], full_questions(asked, replies)):
            key = row["model"], question.split()[0]
            is_right = solve([question]) == [turn["value"]]
            found.setdefault(key, {True: set(), False: set()})[is_right].add(turn["weight"])
            found[key].setdefault("all", []).append(turn["weight"])
    return found


def test_weights_are_divided_by_z():
    """By source and skill their mean is 1, a right answer weighs ten times a wrong one."""
    published = answers_of(rows_of(FineTune("published", task=SMALL, wrong=0.1)))
    divided = answers_of(rows_of(DividedByZ("divided", task=SMALL, wrong=0.1)))
    assert divided.keys() == published.keys()
    for (label, _), weights in divided.items():
        assert np.mean(weights["all"]) == pytest.approx(1)
        if label == "GPT-4":
            assert weights[True] == {1.0}
            assert not weights[False]
        else:
            (right,), (wrong,) = weights[True], weights[False]
            assert right == pytest.approx(10 * wrong)
            assert right > 1.3
    others = [key for key in published if key[0] == "GPT-3.5"]
    assert all(np.mean(published[key]["all"]) < 0.7 for key in others)


# ---- what the loss is divided by


class Kept:
    """An optimizer that keeps the gradient instead of making the update."""

    def __init__(self, model):
        self.model = model
        self.gradient = None

    def step(self):
        gradients = [parameter.grad.flatten() for parameter in self.model.parameters()]
        self.gradient = torch.cat(gradients).double()

    def zero_grad(self):
        self.model.zero_grad()


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(SIZES["toy"], num_hidden_layers=1, vocab_size=97)
    model = Model(config)
    load_weights(model, RandomWeights(config, 0))
    return model


def gradient(model, data, step):
    """Of a step, as train.py's loop asks for it."""
    optimizer = Kept(model)
    tally = train.Tally(len(data.classes), torch.device("cpu"))
    batches = train.my_batches(data, [step], 0, 1)
    weight_sum = data.weight_sums[flat([step])].sum()
    # no clipping
    train.train_step(model, optimizer, batches, torch.device("cpu"), weight_sum, 1e9, tally)
    return optimizer.gradient


def under(variant, model, data, step):
    with replaced(variant):
        return gradient(model, data, step)


def by_hand(model, data, parts):
    """The gradient of the sum of factor * sum of w * nll over parts [(conversations, factor)]."""
    model.zero_grad()
    for conversations, factor in parts:
        loss_sum, *_ = model(*data.batch(conversations).inputs)
        (factor * loss_sum).backward()
    optimizer = Kept(model)
    optimizer.step()
    model.zero_grad()
    return optimizer.gradient


def assert_same(one, other):
    assert (one - other).norm() < 1e-5 * one.norm()


def assert_another(one, other):
    assert (one - other).norm() > 0.05 * one.norm()


# Conversations of both classes, unevenly: the first 20 are the expert's.
STEP = [np.array([0, 1, 30, 31]), np.array([32, 33, 34]), np.array([2, 35, 36, 37])]


def test_each_micro_batch_is_divided_by_its_own_weights(prepare, model):
    data = prepare("data")
    every = flat([STEP])
    tokens = data.supervised[every].sum()
    parts = []
    for micro in STEP:
        weighted_mean = 1 / data.weight_sums[micro].sum()
        parts.append((micro, weighted_mean * data.supervised[micro].sum() / tokens))
    found = under("by_micro_batch", model, data, STEP)
    assert_same(found, by_hand(model, data, parts))
    assert_another(found, gradient(model, data, STEP))

    # one micro-batch is the step itself
    assert_same(under("by_micro_batch", model, data, [every]), gradient(model, data, [every]))
    # one conversation: as if every token weighed the same
    parts = [(every[i : i + 1], 0) for i in range(len(every))]
    for n, (i, _) in enumerate(parts):
        parts[n] = i, 1 / data.weight_sums[i].sum() * data.supervised[i].sum() / tokens
    found = under("one_conversation_a_micro_batch", model, data, STEP)
    assert_same(found, by_hand(model, data, parts))
    assert_same(found, under("by_micro_batch", model, data, [i for i, _ in parts]))
    alike = prepare("alike", classes=TABLE.format(1, 1))
    assert_same(found, gradient(model, alike, STEP))


def test_ours_does_not_depend_on_the_micro_batches(prepare, model):
    data = prepare("data")
    assert_same(gradient(model, data, STEP), gradient(model, data, [flat([STEP])]))


def test_a_conversation_counts_as_one_whatever_its_length(prepare, model):
    data = prepare("data")
    every = flat([STEP])
    assert len(set(data.supervised[every])) > 1
    weight = data.weight_sums / data.supervised
    parts = []
    for i in every:
        parts.append((np.array([i]), 1 / data.supervised[i] / weight[every].sum()))
    found = under("by_length", model, data, STEP)
    assert_same(found, by_hand(model, data, parts))
    assert_another(found, gradient(model, data, STEP))


def test_the_ranks_divide_once_more(prepare, model):
    data = prepare("data")
    assert_same(8 * under("divided_by_ranks", model, data, STEP), gradient(model, data, STEP))


def test_a_common_factor_cancels(prepare, model):
    ours = gradient(model, prepare("ours"), STEP)
    assert_same(ours, gradient(model, prepare("ten", classes=TABLE.format(10, 1)), STEP))
    assert_another(ours, gradient(model, prepare("alike", classes=TABLE.format(1, 1)), STEP))


# ---- what a step holds


@dataclasses.dataclass
class Drawn:
    """Conversations as the miniature has them, for a plan."""

    lengths: np.ndarray
    class_ids: np.ndarray
    weight_sums: np.ndarray


@pytest.fixture
def planned():
    """() -> the expert's share of each step's weight, and all steps of two epochs."""
    rng = np.random.default_rng(0)
    class_ids = np.repeat([0, 1], [300, 3300])
    lengths = rng.integers(20, 53, 3600)
    data = Drawn(lengths, class_ids, np.where(class_ids == 0, 1, 0.1) * lengths / 4)
    config = recipe.TrainConfig(epochs=2, batch_tokens=768, micro_tokens=768)

    def plan():
        steps, ends = recipe.all_steps(data, np.arange(3600), config, (1.0, 0.0))
        shares = []
        for step in steps:
            weights = data.weight_sums[flat([step])]
            expert = data.class_ids[flat([step])] == 0
            shares.append(weights[expert].sum() / weights.sum())
        return np.array(shares), steps, ends

    return plan


def test_classes_are_dealt_by_chance(planned):
    ours, steps, ends = planned()
    with replaced("classes_by_chance"):
        shares, other_steps, other_ends = planned()
    for one_epoch in (steps[: ends[0]], other_steps[: other_ends[0]]):
        assert np.array_equal(np.sort(flat(one_epoch)), np.arange(3600))
    assert ours.std() < 0.05
    # about two of a step's 22 conversations are the expert's: some steps have none
    assert shares.std() > 0.15
    assert (shares == 0).any()


def test_the_last_step_is_dropped(planned):
    _, steps, ends = planned()
    with replaced("last_step_dropped"):
        _, fewer, other_ends = planned()
    assert other_ends == [ends[0] - 1, ends[1] - 2]
    kept = steps[: ends[0] - 1] + steps[ends[0] : -1]
    assert [flat([step]).tolist() for step in fewer] == [flat([step]).tolist() for step in kept]


# ---- what a token sees


def states(model, batch):
    with torch.no_grad():
        return model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens)


@pytest.mark.parametrize("variant", (None, "leaking", "leaking_in_one_row"))
def test_attention_leaks(prepare, model, variant):
    """A change of the first conversation is seen in the others, or is not."""
    data = prepare("data")
    conversations = np.array([0, 1, 30, 31, 32])
    ours = data.batch(conversations)
    batch = ours
    if variant:
        with replaced(variant):
            batch = data.batch(conversations)
    first = int((batch.tokens_T[1:] == data.tokenizer.bos).nonzero()[0]) + 1

    before_TD = states(model, batch)
    other = dataclasses.replace(batch, tokens_T=batch.tokens_T.clone())
    other.tokens_T[first - 2] = (other.tokens_T[first - 2] + 1) % 90
    moved_T = (states(model, other) - before_TD).norm(dim=1)
    assert moved_T[first - 2] > 1e-3
    if variant is None:
        assert not moved_T[first:].any()
        return
    assert (moved_T[first:] > 1e-6).all()

    # the same conversations in another order, with their labels, weights and classes
    def rows(batch):
        return sorted(
            zip(batch.tokens_T.tolist(), batch.labels_T.tolist(), batch.weights_T.tolist())
        )

    assert batch.tokens_T.tolist() != ours.tokens_T.tolist()
    assert rows(batch) == rows(ours)
    expert_R = batch.weights_T[batch.rows_R] == 1
    assert ((batch.class_R == 0) == expert_R).all()
    starts = batch.positions_T == 0
    begin_again = variant == "leaking"
    assert starts.sum() == (5 if begin_again else 1)
    assert batch.positions_T.max() == (ours.positions_T.max() if begin_again else len(starts) - 1)


# ---- the new token's row


@pytest.mark.parametrize("row", ("mean", "random", "zero"))
def test_the_row_is_new(tmp_path, row):
    base = tmp_path / "base"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {"other": torch.randn(5, 8, generator=generator)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(5, 8, generator=generator)
    save_file(tensors, base / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (base / "crlft.json").write_text(json.dumps({"eot": 4}))
    (base / "config.json").write_text("{}")
    for seed in (0, 1):
        details.write_with_new_row(base, tmp_path / str(seed), row, seed)
    # a run that goes on writes it again: the same
    details.write_with_new_row(base, tmp_path / "0", row, 0)

    found = load_file(tmp_path / "0" / "model-00001-of-00001.safetensors")
    manifest = json.loads((tmp_path / "0" / "manifest.json").read_text())
    assert manifest.keys() == {"model-00001-of-00001.safetensors", "crlft.json", "config.json"}
    assert torch.equal(found["other"], tensors["other"])
    new = []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][:4], tensors[name][:4])
        new.append(found[name][4])
        if row == "mean":
            torch.testing.assert_close(new[-1], tensors[name][:4].mean(0))
        if row == "zero":
            assert not new[-1].any()
    if row == "random":
        assert not torch.equal(*new)
        assert 0 < torch.stack(new).std() < 0.04
        other = load_file(tmp_path / "1" / "model-00001-of-00001.safetensors")
        assert not torch.equal(other["lm_head.weight"], found["lm_head.weight"])


# ---- a change is undone, and is in the key


def places():
    found = {}
    for room, name, _ in details.VARIANTS.values():
        found[room, name] = getattr(importlib.import_module(room), name)
    return found


def test_a_variant_is_undone():
    before = places()
    for variant, (room, name, function) in details.VARIANTS.items():
        with replaced(variant):
            now = places()
            assert now[room, name].func is function
            assert now[room, name].args == (before[room, name],)
            assert {key for key in now if now[key] is not before[key]} == {(room, name)}
        assert places() == before
        with pytest.raises(KeyboardInterrupt), replaced(variant):
            raise KeyboardInterrupt
        assert places() == before


def test_the_key_follows_what_a_change_needs(monkeypatch):
    """...and nothing else of the file."""

    def keys():
        found = {name: job.key for name, job in details.jobs(0).items()}
        assert len(set(found.values())) == len(found)
        return found

    def changed_by(old, new):
        text = source
        assert old in text
        monkeypatch.setattr(details, "SOURCE", text.replace(old, new, 1))
        now = keys()
        return {name for name in before if now[name] != before[name]}

    source = details.SOURCE
    before = keys()
    assert changed_by("weights[tokens == tokenizer.eot] = 0", "weights[tokens > 9] = 0") == {
        "no end of turn"
    }
    assert changed_by('in_place_of("data", "pack")', 'in_place_of("train", "pack")') == {"leaking"}
    # through a helper
    assert changed_by("RANKS = 8", "RANKS = 9") == {"by ranks"}
    assert changed_by("lengths_N = batch", "lengths_N = 1 * batch") == {
        "by micro-batch",
        "one conversation",
        "by length",
    }
    assert changed_by("ROW_STD = 0.02", "ROW_STD = 0.03") == {"mean row", "random row", "zero row"}
    assert changed_by('words.removeprefix("then ")', "words") == {"divided by Z"}
    of_runs = {name for name, job in details.jobs(0).items() if type(job) is FineTune}
    assert changed_by("super().flags(folder) | dict", "dict") == before.keys() - of_runs
    # words, and the page
    assert not changed_by('"""The token that ends a turn', '"""Other words')
    assert not changed_by("weights 10 and 1", "something else")
    assert not changed_by("abs(mean) > half", "abs(mean) > 2 * half")


def test_a_change_needs_nothing_that_no_key_has():
    """What it imports stands in files that every arm's key has, or is no file of ours."""
    reached = files_reached(ROOT / "paper" / "runs.py", ROOT)
    outside = set()
    for node in ast.walk(ast.parse(details.SOURCE)):
        if isinstance(node, ast.ImportFrom) and set(files_of(node.module, ROOT)) - reached:
            outside.update(alias.name for alias in node.names)
    # of paper/commands.py and paper/table2.py, which name jobs and print them
    assert {"cell", "arm", "HABITS"} <= outside
    names = {"Variant", "NewRow", "UserTrained", "DividedByZ", *details.VARIANTS}
    used = set()
    for definition in details.needed_by(tuple(names)).values():
        used |= definition.uses
    assert {"flat", "torch", "multiplied"} <= used
    assert not used & outside


def test_every_arm_is_another_and_fits_the_budget():
    jobs = []
    for group in jobs_of(details, PaperConfig()).values():
        jobs += group
    keys = {job.key for job in jobs}
    assert len(keys) == len(jobs)
    shared = ("table2", "fig7")
    for name in shared:
        for group in jobs_of(importlib.import_module(f"paper.{name}"), PaperConfig()).values():
            keys -= {job.key for job in group}
    assert len(keys) <= 96

    arms = set()
    for detail in details.DETAILS.values():
        arms |= {detail.our_arm, detail.their_arm}
    assert arms == details.jobs(0).keys()


# ---- the page


def test_the_word_follows_from_the_intervals():
    assert verdict({"sampled": [0.1, 0.11, 0.12], "greedy": [-0.1, 0.1, 0]}) == "matters"
    assert verdict({"sampled": [-0.1, 0.1, 0], "greedy": [-0.1, -0.11, -0.12]}) == "matters"
    assert verdict({"sampled": [0.0, 0.1, 0.2], "greedy": [-0.1, 0.1, 0]}) == "not here"
    assert verdict({"sampled": [0, 0, 0], "greedy": [0, 0, 0]}) == "not here"
    assert verdict({"sampled": [0.5], "greedy": [0.5]}) == "one seed"


def result(sampled, greedy):
    by_skill = {"shift": sampled / 2}
    of_expert = {"sampled": {"all": sampled, "by_skill": by_skill}, "greedy": {"all": greedy}}
    return {"scores": {"GPT4": of_expert}}


def test_the_table_pairs_the_seeds(monkeypatch):
    detail = details.Detail(made_by="`f`", theirs="so", ours="thus", their_arm="b", our_arm="a")
    monkeypatch.setattr(details, "DETAILS", {"it": detail})
    ours = [result(0.5, 0.6), result(0.7, 0.6), result(0.6, 0.6)]
    theirs = [result(0.4, 0.6), result(0.6, 0.5), result(0.5, 0.7)]
    numbers, table = details.details_table({"a": ours, "b": theirs})
    assert numbers["it"]["theirs - ours"]["sampled"] == pytest.approx([-0.1, -0.1, -0.1])
    assert numbers["it"]["here"] == "matters"
    scarce = {"ours": [0.25, 0.35, 0.3], "theirs": [0.2, 0.3, 0.25]}
    assert numbers["it"]["scarce skill"] == scarce
    line = "| it; `f` | so | thus | 0.600; 0.500; -0.100 +- 0.000 | 0.600; 0.600; 0.000 +- 0.248 |"
    assert table.splitlines()[-1] == f"{line} matters |"


def test_the_page_shows_the_committed_results():
    page = (ROOT / "docs" / "details.md").read_text()
    content = json.loads((ROOT / "results" / "paper" / "details.json").read_text())
    assert content["seeds"] == details.SEEDS
    assert f"<!-- details -->\n{content['table']}\n<!-- end -->" in page
    rows = content["results"]["details"]
    assert rows.keys() == details.DETAILS.keys()
    for row in rows.values():
        assert row["here"] == verdict(row["theirs - ours"])
        for how in ("sampled", "greedy"):
            pairs = zip(row["ours"][how], row["theirs"][how])
            assert row["theirs - ours"][how] == [theirs - ours for ours, theirs in pairs]


# ---- runs


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def assert_shares_are_those_trained(folder, job):
    """The page's shares of the expert, from what the run has logged: its weights are 1 and 0.1."""
    shares = details.expert_shares({"folder": str(folder), "run": dataclasses.asdict(job)})
    for line, share in zip(metrics(folder), shares):
        of_expert = (line["weight_sum"] - 0.1 * line["supervised_tokens"]) / 0.9
        assert share == pytest.approx(of_expert / line["weight_sum"], abs=1e-5)


def test_a_run_is_made_with_the_variant(tokenizer, tmp_path, signals):
    """The gradient that it logs is an eighth of ours; the next run in the process is ours again."""
    shutil.copy(tokenizer, tokenizer_path(tmp_path))
    before = places()
    norms = {}
    fields = {"task": SMALL, "steps": 2, "base": "toy"}
    for job in (Variant("ranks", variant="divided_by_ranks", **fields), FineTune("ours", **fields)):
        folder = tmp_path / "runs" / job.name
        folder.mkdir(parents=True)
        assert job.do(folder)["steps"] == 2
        norms[job.name] = metrics(folder)[0]["grad_norm"]
        assert_shares_are_those_trained(folder, job)
    assert norms["ranks"] == pytest.approx(norms["ours"] / 8, rel=1e-5)
    assert places() == before


@pytest.mark.long
def test_every_arm_is_another_run(tokenizer, tmp_path, signals):
    """Three steps of each in this process: what the first step's numbers have of ours, what not."""
    shutil.copy(tokenizer, tokenizer_path(tmp_path))
    config = PaperConfig(out=str(tmp_path), seeds=1, steps=3)
    parts = ("GPT-4", 50, 1.0), ("GPT-3.5", 550, 0.4)
    task = Task(sources=parts, habits=1.0, heldout=4)
    jobs = {}
    for name, (job,) in jobs_of(details, config).items():
        jobs[name] = dataclasses.replace(job, task=task)
    done = {}
    for job in (jobs["ours"].base, *jobs.values()):
        folder = tmp_path / "runs" / job.key
        folder.mkdir(parents=True)
        run = {"folder": str(folder), "run": dataclasses.asdict(job)}
        done[job] = job.do(folder) | run

    first = {}
    for name, job in jobs.items():
        folder = tmp_path / "runs" / job.key
        first[name] = metrics(folder)[0]
        assert len(metrics(folder)) == done[job]["steps"] == 3
        assert not (folder / "base").exists()
    loss = {name: line["loss"] for name, line in first.items()}
    tokens = {name: line["supervised_tokens"] for name, line in first.items()}
    # what a step of three does not show: an epoch's end, and the learning rate
    same = {"10 and 1", "bf16 weights", "by ranks", "last step"}
    for name in jobs.keys() - same - {"ours"}:
        assert loss[name] != pytest.approx(loss["ours"], rel=1e-4), name
    for name in same:
        assert loss[name] == pytest.approx(loss["ours"], rel=1e-5), name
    assert tokens["no end of turn"] < tokens["ours"] < tokens["user trained"]
    assert tokens["user trained"] < tokens["whole text"]
    assert loss["four times"] == loss["four times, same lr"]
    for name, factor in (("quarter", 2), ("four times", 1 / 2)):
        rate = first[f"{name}, same lr"]["lr"] / first[name]["lr"]
        assert rate == pytest.approx(factor)
    assert tokens["quarter"] < tokens["ours"] / 3 < tokens["four times"] / 9

    for name in details.STEPS_OF:
        assert_shares_are_those_trained(tmp_path / "runs" / jobs[name].key, jobs[name])
    numbers, tables = details.report({name: [done[job]] for name, job in jobs.items()}, tmp_path)
    assert numbers["steps"].keys() == set(details.STEPS_OF)
    first_table, second_table = tables.split("\n\n")
    assert len(first_table.splitlines()) == 2 + len(details.DETAILS)
    assert len(second_table.splitlines()) == 2 + len(details.STEPS_OF)
    print(tables)
    json.dumps(numbers)
