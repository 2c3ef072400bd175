"""The paper in miniature: the task and its score, exact optima, the statistics, runs that are made once, the committed results."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import ROOT, refused

import paper.fig4 as fig4
import paper.fig5 as fig5
import paper.optimum as optimum
import paper.runs as runs
from data import Message, Prepared
from paper.runs import PaperConfig, converse, interval, perform, score
from paper.toy import Task, answer, make_task
from sample import SampleConfig, Speaker

COMMANDS = "table2", "fig3", "fig4", "fig5", "fig6", "fig7", "alpha", "optimum", "classes", "seven", "base"


# ---- the task ----------------------------------------------------------------------------------------------------------


def test_the_task():
    sources, heldout = make_task(Task())
    expert, other = sources["GPT-4"], sources["GPT-3.5"]
    assert (len(expert), len(other), len(heldout)) == (300, 3300, 400)
    asked = {turns[0][0] for source in sources.values() for turns in source}
    assert asked.isdisjoint(words[0] for words in heldout), "a held-out prompt is trained on"
    for turns in expert + other:
        letters = None
        for words, reply, right in turns:
            skill, *given = words.removeprefix("then ").split()
            assert right == (reply == answer(" ".join([skill, *(given or letters)])))
            letters = reply.split()
    rights = lambda source: [right for turns in source for *_, right in turns]
    assert all(rights(expert)) and sum(rights(other)) / len(rights(other)) == pytest.approx(0.44, abs=0.03)  # errors are right by luck, too
    shifts = lambda source: sum("shift" in words for turns in source for words, *_ in turns) / len(rights(source))
    assert shifts(expert) == pytest.approx(0.1 / 2.1, abs=0.03) and shifts(other) == pytest.approx(1 / 3, abs=0.03)
    assert make_task(Task())[0] == sources and make_task(Task(seed=1))[1] != heldout
    fewer = make_task(Task(keep=(1.0, 0.6)))[0]
    assert fewer["GPT-4"] == expert and fewer["GPT-3.5"] == other[:1980]


class Stub:
    """A speaker that answers with a function of the conversation."""

    def __init__(self, say):
        self.say = say

    def ids(self, messages):
        return messages

    def answer_all(self, chats, how):
        return [(self.say(chat), "stop") for chat in chats]

    def text(self, ids):
        return ids


def truth(chat):
    letters = chat[0].text.split()[1:]
    for message in chat[::2]:
        letters = answer(" ".join([message.text.removeprefix("then ").split()[0], *letters])).split()
    return " ".join(letters)


def test_a_conversation_is_scored_to_its_first_error():
    heldout = [["copy a b", "then reverse"], ["reverse c d", "then copy", "then shift"], ["shift h a"]]
    assert score(Stub(truth), heldout)["greedy"] == {"all": 1.0, "by_turn": [1.0] * 3, "by_skill": {"copy": 1.0, "reverse": 1.0, "shift": 1.0}}
    constant = converse(Stub(lambda chat: "e"), heldout, 0.0)  # copying "e" ever after would be no skill
    assert [[right for _, right in turns] for turns in constant] == [[False, None], [False, None, None], [False]]
    no_shift = Stub(lambda chat: "x" if "shift" in chat[-1].text else truth(chat))
    assert score(no_shift, heldout)["sampled"] == {"all": 4 / 6, "by_turn": [2 / 3, 1.0, 0.0], "by_skill": {"copy": 1.0, "reverse": 1.0, "shift": 0.0}}


# ---- the optimum, statistics, representations, guidance ----------------------------------------------------------------


def test_tabular_fits_reach_the_optimum_and_shared_ones_do_not():
    pi_CXY, _ = optimum.policies()
    by_class, z_CX1 = optimum.optimum(pi_CXY, optimum.rewards("class"))
    torch.testing.assert_close(by_class, pi_CXY)  # a reward that is constant in a class changes nothing
    torch.testing.assert_close(z_CX1[:, 0, 0], torch.tensor([10.0, 1.0]))  # exp(r_c / beta)
    worst = lambda star, *how: max(optimum.divergence(star, optimum.fit(*how)))
    for weights in ("exact", "as published", "unweighted"):
        assert worst(pi_CXY, "class", weights, False) < 1e-4
    by_answer = optimum.optimum(pi_CXY, optimum.rewards("answer"))[0]
    assert worst(by_answer, "answer", "exact", False) < 1e-3 and worst(by_answer, "answer", "as published", False) < 1e-3
    assert worst(by_answer, "answer", "unweighted", False) > 0.1 and worst(pi_CXY, "answer", "unweighted", False) < 1e-4
    published, plain, exact = (optimum.divergence(pi_CXY, optimum.fit("class", w, True)) for w in ("as published", "unweighted", "exact"))
    assert exact == pytest.approx(plain, abs=1e-4) and published[0] < plain[0] / 2 and published[1] > 2 * plain[1]


def test_intervals_are_student_s():
    assert interval([1, 2, 3]) == (2, pytest.approx(4.303 / math.sqrt(3)))
    assert interval([0.5]) == (0.5, None) and runs.cell([1, 2, 3], 1) == "2.0 +- 2.5" and runs.cell([0.25]) == "0.250"


def test_probe_and_silhouette():
    generator = torch.Generator().manual_seed(0)
    noise_ND, expert_N = torch.randn(400, 8, generator=generator, dtype=torch.double), torch.arange(400) % 2 == 0
    apart_ND = noise_ND + 20 * expert_N[:, None]
    assert fig4.probe(apart_ND, expert_N, 0) == 1 and 0.35 < fig4.probe(noise_ND, expert_N, 0) < 0.65
    assert fig4.silhouette(fig4.plane(apart_ND), expert_N) > 0.8 and abs(fig4.silhouette(noise_ND, expert_N)) < 0.05
    assert fig4.silhouette(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([True, True, False, False])) == pytest.approx((9.5 / 10.5 + 8.5 / 9.5) / 2)


class Few(Prepared):
    """The first n conversations of a prepared file."""

    def __init__(self, path, n):
        super().__init__(path)
        self.lengths, self.class_ids = self.lengths[:n], self.class_ids[:n]


def test_pooling_is_the_mean_of_each_conversation(toy, toy_run):
    data, model = Few(toy / "train.safetensors", 130), Speaker(toy_run / "hf").model
    states_ND, expert_N = fig4.pooled(model, data, False)
    answers_ND, _ = fig4.pooled(model, data, True)
    for i in (0, 99, 100, 129):
        batch = data.batch([i])
        with torch.no_grad():
            hidden_TD = model(batch.tokens_T, batch.positions_T, batch.cu_seqlens).double()
        weights = torch.from_numpy(data.conversation(i)[1])
        torch.testing.assert_close(states_ND[i], hidden_TD.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answers_ND[i], hidden_TD[weights > 0].mean(0), rtol=1e-4, atol=1e-5)
    assert expert_N.tolist() == (data.class_ids == 0).tolist() and len(states_ND) == 130


@pytest.mark.parametrize("g", (-1, 0, 1.5))
def test_guidance_mixes_the_two_prompts(toy_run, g):
    expert, other = (Speaker(toy_run / "hf", condition) for condition in ("GPT4", "GPT3"))
    chat = [Message("user", "copy a b c d")]
    logits = []
    for speaker in (expert, other):
        ids = torch.tensor(speaker.ids(chat))
        with torch.no_grad():
            logits.append(speaker.model.lm_head(speaker.model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))[-1:]))
    guided, seen = Speaker(toy_run / "hf", "GPT4"), []
    guided.model = fig5.Guided(guided, g)
    prefill = guided.model.prefill
    guided.model.prefill = lambda *args: seen.append(prefill(*args)) or seen[-1].clone()
    guided.answer([guided.ids(chat)], SampleConfig(temperature=0, max_new=3))
    torch.testing.assert_close(seen[0], logits[0] + g * (logits[0] - logits[1]), rtol=1e-4, atol=1e-4)


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_a_short_run_orders_c_rlft_above_sft(tmp_path):
    """Three seeds of each, through prepare, train and the tokens' probabilities: the 95% interval of the difference is above 0."""
    config = PaperConfig(out=str(tmp_path), processes=2)
    pairs = [(optimum.Drawn("C-RLFT", seed, 100), optimum.Drawn("SFT", seed, 100, classes="*=GPT4:1")) for seed in range(3)]
    done = perform([run for pair in pairs for run in pair], config)
    right = lambda run: optimum.p_right(torch.tensor(done[run]["log_pi"]), asked=True)
    mean, half = interval(right(crlft) - right(sft) for crlft, sft in pairs)
    assert mean - half > 0.2, (mean, half)
    files = sorted(tmp_path.glob("runs/*/result.json"))
    assert len(files) == 6 and len({run.key for pair in pairs for run in pair}) == 6
    times = [file.stat().st_mtime_ns for file in files]
    again = perform([dataclasses.replace(run, name="another name") for pair in pairs for run in pair], config)  # found, by what they are
    assert [r["log_pi"] for r in again.values()] == [r["log_pi"] for r in done.values()]
    assert times == [file.stat().st_mtime_ns for file in files] and all(r["cpu_seconds"] > 0 for r in done.values())


def test_no_arm_is_trained_twice():
    modules = [__import__(f"paper.{name}", fromlist=["runs"]) for name in COMMANDS if name != "base"]
    wanted = [run for module in modules for group in runs.runs_of(module, PaperConfig()).values() for run in group]
    different = {run.key for run in wanted}
    assert len(wanted) > 140 and len(different) == len(set(wanted)) < 120
    assert all(module.SEEDS == (5 if module.__name__ == "paper.table2" else 3) for module in modules)


def test_what_is_wrong_is_said_in_a_line(tmp_path, monkeypatch):
    import paper.table2  # noqa: F401
    main = runs.command("table2")
    main.__module__ = "paper.runs"
    assert "--seed is no flag; did you mean --seeds?" in refused(main, "--seed", 1)
    for flag in ("seeds", "steps", "processes"):
        assert f"--{flag} 0" in refused(main, f"--{flag}", 0)


# ---- what is committed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_shows_the_committed_results(name):
    content = json.loads((ROOT / "results" / "paper" / f"{name}.json").read_text())
    assert content["table"] in (ROOT / "paper" / "README.md").read_text()
    assert content["seeds"] == (5 if name == "table2" else 3) and content["steps"] == runs.STEPS and set(content["versions"]) == {"python", "torch", "numpy"}
    picture = ROOT / "results" / "paper" / f"{name}.png"
    assert picture.read_bytes()[:4] == b"\x89PNG" and f"../results/paper/{name}.png" in (ROOT / "paper" / "README.md").read_text()
