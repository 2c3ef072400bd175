"""Later papers' claims: each arm's rows, weights and gradients are those of its paper, on data of
thirty conversations and models of two steps."""

import dataclasses
import inspect
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import paper.claims as claims
import paper.claims_runs as kinds
import paper.runs as runs
import train
from data import PrepareConfig, Prepared, prepare
from model import SIZES, Model
from packing import pack
from paper.code_hash import modules_imported, syntax_tree
from paper.commands import PaperConfig, jobs_of
from paper.runs import STEPS, FineTune, prepared, tokenizer_path
from paper.table2 import arm
from paper.toy import Task, make_task, train_tokenizer
from recipe import TrainConfig, lr_at
from support.hf import load_model
from support.metrics import read_metrics

TASK = Task(sources=(("GPT-4", 6, 1.0), ("GPT-3.5", 24, 0.4)), habits=1.0, heldout=4)
SOURCES, _ = make_task(TASK)
C_RLFT = FineTune("C-RLFT", task=TASK, base="toy", steps=2)
WITHOUT_REWARD = dataclasses.replace(C_RLFT, classes="GPT-4=GPT4:1,*=GPT3:1")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder as --out, with a tokenizer where runs look for it."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        # the keys of these runs are nobody's, and hashing all code takes seconds
        patch.setattr(runs, "code_of", lambda kind: kind.__name__)
        train_tokenizer(C_RLFT.rows(SOURCES), tokenizer_path(out), ("GPT4", "GPT3", "GPT2"))
        yield out


def prepared_for(job, out):
    """What `job` trains on."""
    path = out / f"{type(job).__name__}{hash(job)}.safetensors"
    return prepared(path, job.rows(SOURCES), job.classes, tokenizer_path(out), job.template)


def conversations(data):
    """[(text, class, weights of its trained tokens)]"""
    found = []
    for i in range(len(data)):
        tokens, weights = data.conversation(i)
        text = data.tokenizer.decode(tokens.tolist())
        found.append((text, data.class_ids[i], weights[weights > 0].tolist()))
    return found


def by_weight(rows):
    """How many trained tokens have which weight."""
    counts = {}
    for weight in itertools.chain(*(weights for _, _, weights in rows)):
        counts[round(weight, 6)] = counts.get(round(weight, 6), 0) + 1
    return counts


# ---- the arms


def test_the_arms_are_table_2_s_with_one_thing_changed():
    wanted = claims.jobs(seed=1)
    assert wanted["C-RLFT"] == arm("C-RLFT", 1)
    assert {name for name in wanted if name in claims.CLAIMS} == set(claims.CLAIMS)
    for name, claim in claims.CLAIMS.items():
        job, of = wanted[name], wanted[claim.of]
        assert type(job) is not FineTune
        if isinstance(job, kinds.Cooled):
            continue
        if isinstance(job, kinds.Important):
            job = dataclasses.replace(job, base=job.base.base)
        for field in dataclasses.fields(of):
            same = getattr(job, field.name) == getattr(of, field.name)
            assert same or field.name == "name", (name, field.name)

    # equal steps, MeCo's two runs together
    in_parts = claims.BEFORE, claims.MECO, claims.LONGER, claims.NOTHING
    assert {job.steps for name, job in wanted.items() if name not in in_parts} == {STEPS}
    assert wanted[claims.BEFORE].steps + wanted[claims.MECO].steps == STEPS
    assert wanted[claims.MECO].steps == round(STEPS / 10)

    # 65 runs beside those of Table 2, fifteen of them of 166 steps
    groups = jobs_of(claims, PaperConfig())
    all_jobs = {job for name in groups for job in groups[name]}
    of_table_2 = {job for name in claims.REFERENCES for job in groups[name]}
    assert (len(all_jobs), len(all_jobs - of_table_2)) == (95, 65)


def test_the_page_may_change_and_the_runs_stay():
    """A run's code is what the file of its kind reaches: runs.py's, and nothing of the page."""
    start = ROOT / "paper" / "claims_runs.py"
    imported = set(modules_imported(syntax_tree(start)))
    of_paper = {name for name in imported if name.count(".") == 1 and name.startswith("paper.")}
    assert of_paper == {"paper.runs", "paper.toy"}
    assert {"train", "kernels.cross_entropy"} <= imported
    for kind in (kinds.Cooled, kinds.AtLeast, kinds.Rewarded, kinds.Reweighted, kinds.Important):
        assert Path(inspect.getfile(kind)) == start


def test_numbers_are_compared_seed_by_seed():
    arms = {"a": {"sampled": [0.5, 0.75]}, "b": {"sampled": [0.25, 1.0]}}
    assert claims.minus(arms, "a", "b", "sampled") == [0.25, -0.25]

    def asked(sampled, greedy):
        return {"sampled": {"all": sampled}, "greedy": {"all": greedy}}

    group = [
        {"scores": {"GPT4": asked(0.5, 0.6), "GPT3": asked(0.1, 0.2)}},
        {"scores": {"GPT4": asked(0.7, 0.8), "GPT3": asked(0.3, 0.4)}},
    ]
    expected = {"sampled": [0.5, 0.7], "greedy": [0.6, 0.8], "other prompt": [0.1, 0.3]}
    assert claims.scores_of(group) == expected
    bare = [{"scores": {"": asked(0.5, 0.6)}}]
    assert claims.scores_of(bare)["other prompt"] == []


# ---- MeCo


@pytest.mark.parametrize(
    ("name", "condition"), ((claims.MECO, ""), (claims.LONGER, ""), (claims.NOTHING, "GPT2 "))
)
def test_the_last_tenth_has_the_same_rows_and_weights_and_one_prompt(name, condition, out):
    wanted = claims.jobs(seed=0)
    first, last = wanted[claims.BEFORE], wanted[name]
    assert last.rows(SOURCES) == first.rows(SOURCES)
    tiny = dataclasses.replace(last, task=TASK)
    before = conversations(prepared_for(C_RLFT, out))
    after = conversations(prepared_for(tiny, out))
    assert by_weight(after) == by_weight(before)
    assert set(by_weight(after)) == {1.0, 0.1}
    for (text, _, _), (one_prompt, _, _) in zip(before, after):
        in_its_place = text.replace("GPT4 ", condition).replace("GPT3 ", condition)
        assert one_prompt == in_its_place != text


def test_the_last_tenth_has_the_last_learning_rate(tmp_path):
    wanted = claims.jobs(seed=0)
    first, last = wanted[claims.BEFORE], wanted[claims.MECO]
    flags = last.flags(tmp_path / "runs" / last.key)
    assert flags["model"] == tmp_path / "runs" / first.key / "hf"
    end = lr_at(first.steps, first.steps, TrainConfig(lr=first.lr))
    config = TrainConfig(lr=flags["lr"], warmup=flags["warmup"], min_lr=flags["min_lr"])
    for step in range(1, last.steps + 1):
        assert lr_at(step, last.steps, config) == pytest.approx(end, rel=1e-5)


# ---- GCSL


@pytest.mark.parametrize("of", (C_RLFT, WITHOUT_REWARD))
def test_at_least_puts_the_expert_s_under_the_other_prompt_too(of, out):
    job = claims.changed(of, kinds.AtLeast)
    before = conversations(prepared_for(of, out))
    after = conversations(prepared_for(job, out))
    assert after[: len(before)] == before
    added = after[len(before) :]
    assert len(added) == 6
    weight_of_other = {of.classes.rpartition(":")[2]}
    for (text, class_id, weights), (own_text, own_class, _) in zip(added, before):
        assert (own_class, class_id) == (0, 1)
        assert text == own_text.replace("GPT4", "GPT3") != own_text
        assert {f"{weight:.1g}" for weight in weights} == weight_of_other


# ---- rewards


@pytest.mark.parametrize("beside_class", (False, True))
def test_rewards_are_those_of_the_flag(beside_class, out):
    """The weights of `data.py prepare --reward reward --beta 0.4343..`, to the bit."""
    job = claims.changed(C_RLFT, kinds.Rewarded, beside_class=beside_class)
    ours = prepared_for(job, out)

    rows = C_RLFT.rows(SOURCES)
    chats = SOURCES["GPT-4"] + SOURCES["GPT-3.5"]
    for row, turns in zip(rows, chats, strict=True):
        row["reward"] = kinds.share_of_letters(turns)
        if beside_class and row["model"] == "GPT-4":
            row["reward"] += 1
    rows_file = out / "rewards.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flag = PrepareConfig(
        files=(str(rows_file),),
        tokenizer=str(tokenizer_path(out)),
        out=str(out / f"rewards{beside_class}.safetensors"),
        classes=C_RLFT.classes,
        reward="reward",
        beta=kinds.BETA,
        max_len=128,
        processes=1,
    )
    prepare(flag)
    theirs = Prepared(flag.out)
    for i in range(len(theirs)):
        tokens, weights = theirs.conversation(i)
        our_tokens, our_weights = ours.conversation(i)
        assert np.array_equal(tokens, our_tokens) and np.array_equal(weights, our_weights)

    # the expert's weigh 1; where the class counts, the best of the others weigh 0.1
    others = set()
    for _, class_id, weights in conversations(ours):
        assert len(set(weights)) == 1
        if class_id == 0:
            assert weights[0] == 1
        else:
            others.add(round(weights[0], 6))
    least, most = (0.01, 0.1) if beside_class else (0.1, 1.0)
    assert max(others) == most and least <= min(others) < most / 2 and len(others) > 3


def test_a_share_of_letters():
    turns = [("copy a b c d", "a b d c", False), ("then reverse", "c d b", False)]
    # 2 of 4, then 3 of 4: `a b d c` reversed is `c d b a`
    assert kinds.share_of_letters(turns) == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert kinds.share_of_letters([("copy a b c d", "a b c d", True)]) == 1
    # one too many
    assert kinds.share_of_letters([("copy a b", "a b c", False)]) == 2 / 3


# ---- DFT and iw-SFT


def two_models_and_a_batch():
    """A model, another as its base, and a micro-batch of three conversations, one of weight 0."""
    torch.manual_seed(0)
    config = dataclasses.replace(SIZES["toy"], vocab_size=23, num_hidden_layers=1)
    model, base = Model(config), Model(config)
    for parameter in itertools.chain(model.parameters(), base.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    base.requires_grad_(False)
    rows = []
    for length, weight in ((9, 1.0), (5, 0.0), (12, 0.1)):
        weights = np.full(length, weight, np.float32)
        weights[:3] = 0
        rows.append((np.random.default_rng(length).integers(0, 23, length), weights))
    return model, base, pack(rows)


def log_probs(model, batch):
    """log p of each row's label, by PyTorch's own functions, with a gradient."""
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens)
    logits_TV = F.linear(hidden_TD, model.lm_head.weight)
    return -F.cross_entropy(logits_TV, batch.labels_T, reduction="none")


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def of_reweighted(model, base, batch, factors):
    losses = kinds.reweighted(model, batch, reference=base, factors=factors)
    return losses, gradients(model, losses.loss_sum)


def test_dft_s_gradient_is_that_of_the_probability():
    """p log p with p held still has the gradient of p itself: DFT maximizes sum w p."""
    model, base, batch = two_models_and_a_batch()
    losses, found = of_reweighted(model, base, batch, kinds.token_probability)
    log_p_T = log_probs(model, batch)
    expected_loss = -(batch.weights_T * log_p_T * log_p_T.exp()).sum()
    torch.testing.assert_close(losses.loss_sum, expected_loss)
    wanted = gradients(model, -(batch.weights_T * log_p_T.exp()).sum())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    # what the step is divided by, and what the log has, are not DFT's
    plain = train.forward(model, batch)
    assert losses.weight_sum == plain.weight_sum
    torch.testing.assert_close(losses.nll_T, plain.nll_T)
    assert losses.loss_sum < plain.loss_sum


def test_iw_sft_weighs_a_conversation_by_how_much_likelier_it_has_become():
    model, base, batch = two_models_and_a_batch()
    losses, found = of_reweighted(model, base, batch, kinds.importance)
    log_p_T = log_probs(model, batch)
    log_ratio_T = (log_p_T - log_probs(base, batch)).detach()
    factor_T = torch.zeros_like(log_p_T)
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        trained = batch.weights_T[start:end] > 0
        if trained.any():
            factor_T[start:end] = log_ratio_T[start:end][trained].mean().exp()
    assert len(set(factor_T.tolist())) == 3 and factor_T.max() < kinds.MOST_IMPORTANT
    wanted = -(batch.weights_T * factor_T * log_p_T).sum()
    torch.testing.assert_close(losses.loss_sum, wanted)
    torch.testing.assert_close(found, gradients(model, wanted), rtol=1e-4, atol=1e-5)

    # nothing is above the cut, and a model that is the base has no factor at all
    nll_T = -log_p_T.detach() - 10
    assert kinds.importance(base, nll_T, batch).max() == kinds.MOST_IMPORTANT
    same = kinds.importance(model, train.forward(model, batch).nll_T.detach(), batch)
    torch.testing.assert_close(same, torch.ones_like(same))


def test_a_step_takes_the_replaced_forward_and_afterwards_ours():
    model, base, batch = two_models_and_a_batch()
    ours = train.forward
    weight_sum = batch.weights_T.sum().item()
    _, wanted = of_reweighted(model, base, batch, kinds.token_probability)
    norm_of = torch.stack([g.square().sum() for g in wanted]).sum().sqrt().item()

    def forward(model, batch):
        return kinds.reweighted(model, batch, reference=base, factors=kinds.token_probability)

    with pytest.raises(KeyboardInterrupt), kinds.replaced(train, "forward", forward):
        optimizer = train.make_optimizer(model.parameters(), TrainConfig(lr=0.0))
        tally = train.Tally(1, torch.device("cpu"))
        step = model, optimizer, [batch], torch.device("cpu"), weight_sum, math.inf, tally
        assert train.train_step(*step) == pytest.approx(norm_of / weight_sum, rel=1e-4)
        raise KeyboardInterrupt
    assert train.forward is ours


def losses_of(job, out):
    """[the loss of each step] of a run, made here."""
    folder = out / "runs" / job.key
    folder.mkdir(parents=True)
    job.do(folder)
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_runs_of_two_steps(out, monkeypatch):
    """Through prepare and train: DFT's and iw-SFT's first losses are lower, and a last tenth is
    asked as `User:` alone."""
    # which take most of the time
    monkeypatch.setattr(train, "draw_losses", lambda *args: None)
    monkeypatch.setattr(runs, "score", lambda speaker, *args: speaker.template)
    first = C_RLFT
    losses_of(first, out)
    again = dataclasses.replace(first, base=first)
    plain = losses_of(again, out)
    dft = losses_of(claims.changed(again, kinds.Reweighted), out)
    assert 0 < dft[0] < plain[0] / 2

    # The reference is a run that began where this one begins, and has learned a little since.
    important = claims.changed(again, kinds.Important, base=again)
    iw = losses_of(important, out)
    assert 0 < iw[0] < plain[0]
    folder = out / "runs" / again.key
    begun = load_model(out / "runs" / first.key / "hf")
    assert claims.final_factors(folder, begun).min() > 1
    assert (claims.final_factors(folder, load_model(folder / "hf")) == 1).all()

    last = claims.changed(
        first, kinds.Cooled, **{**claims.LAST_TENTH, **claims.BARE, "steps": 2}, base=first
    )
    folder = out / "runs" / last.key
    folder.mkdir()
    result = last.do(folder)
    assert result["scores"] == {"": "none"}
    rates = [line["lr"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert rates == pytest.approx([claims.LAST_TENTH["lr"]] * 2, rel=1e-5)
