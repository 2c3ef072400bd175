"""sample.py on a real export: against transformers, one prompt against many, files, and what a user
can get wrong."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call, refused, stopped_after

from conversations import Message
from model import SIZES, KVCache
from prompts import BASELINES, PROMPTS
from sample import (
    Answer,
    SampleConfig,
    Speaker,
    chat,
    check_comparison,
    choose,
    main,
    read_prompts,
    say,
    split_conditions,
    uniforms,
)
from support.kept import KeptAnswers

GREEDY = SampleConfig(temperature=0, max_new=12)
QUESTIONS = "copy a b c d", "reverse h g f e d c b", "sort", "shift a a a a a", "a"


@pytest.fixture(scope="module")
def speaker(toy_run):
    return Speaker(toy_run / "hf")


@pytest.fixture(scope="module")
def theirs(toy_run):
    """The same export in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(toy_run / "hf").eval()


def ids_of(speaker, *texts):
    return [speaker.ids([Message("user", text)]) for text in texts]


def greedy(max_new, **flags):
    return dataclasses.replace(GREEDY, max_new=max_new, **flags)


# ---- the tokens


def test_logits_of_the_export_in_transformers(speaker, theirs):
    assert theirs.generation_config.eos_token_id == [96, 2]
    for n in (1, 5, 120):
        ids = torch.randint(0, 97, (n,))
        hidden = speaker.model.hidden(ids, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        with torch.no_grad():
            logits = speaker.model.lm_head(hidden)
            assert torch.allclose(logits, theirs(ids[None]).logits[0], atol=1e-4)


def test_64_greedy_tokens_are_those_of_transformers(speaker, theirs, monkeypatch):
    """Wherever their two best logits are more than 1e-3 apart; nothing stops the text before."""
    monkeypatch.setattr(speaker, "stops", ())
    how = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    prompts = ids_of(speaker, *QUESTIONS)
    for prompt, (got, finish) in zip(prompts, speaker.answer(prompts, greedy(64))):
        assert len(got) == 64
        assert finish == "length"
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
            out = theirs.generate(torch.tensor([prompt]), **how)[0, len(prompt) :]
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1] > 1e-3).long().cumprod(0).bool()
        assert clear.sum() > 8
        assert torch.equal(torch.tensor(got)[clear], out[clear])


def test_unequal_prompts_in_one_batch_give_each_prompts_own_text(speaker):
    prompts = ids_of(speaker, *QUESTIONS)
    together = speaker.answer(prompts, GREEDY)
    assert together == [speaker.answer([ids], GREEDY)[0] for ids in prompts]
    assert speaker.answer_all(prompts, greedy(12, batch=2)) == together


def test_an_answer_ends_at_the_turns_end_at_max_new_or_at_the_contexts(speaker, monkeypatch):
    plan = iter([[5, 5], [speaker.tokenizer.eot, 5], [7, 5], [7, 5]])
    monkeypatch.setattr("sample.choose", lambda logits, config, uniform: torch.tensor(next(plan)))
    answers = speaker.answer(ids_of(speaker, "copy a", "sort b"), greedy(4))
    assert answers == [([5], "stop"), ([5, 5, 5, 5], "length")]
    monkeypatch.undo()
    monkeypatch.setattr(speaker, "stops", ())
    prompt = [1] + [5] * 120
    ((ids, _),) = speaker.answer([prompt], greedy(50))
    assert len(ids) == 128 - 121


def test_choose():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(4000, 1)

    def draw(**how):
        """How often each of the four tokens is drawn."""
        uniform_B = uniforms(0, range(4000), 1)[0]
        tokens = choose(logits.clone(), SampleConfig(**how), uniform_B)
        return torch.bincount(tokens, minlength=4) / 4000

    # the first two in the order of their mass: tokens 1 and 3
    two = torch.tensor([-torch.inf, 3, -torch.inf, 2]).softmax(0)
    assert draw(temperature=0).tolist() == [0, 1, 0, 0]
    assert torch.allclose(draw(temperature=1.0), logits[0].softmax(0), atol=0.03)
    assert torch.allclose(draw(temperature=0.5), (logits[0] * 2).softmax(0), atol=0.03)
    assert torch.allclose(draw(temperature=1.0, top_k=2), two, atol=0.03)
    # Masses 0.64, 0.24, 0.09, 0.03: the set that reaches 0.7 is the first two; 0.6 is reached by
    # the first.
    assert torch.allclose(draw(temperature=1.0, top_p=0.7), two, atol=0.03)
    assert draw(temperature=1.0, top_p=0.6).tolist() == [0, 1, 0, 0]


def test_a_prompts_random_numbers_follow_from_the_seed_and_its_number():
    numbers = uniforms(3, [0, 7, 2**40], 50)
    assert numbers.shape == (50, 3)
    assert 0 <= numbers.min() < 0.05 < 0.95 < numbers.max() < 1
    # whatever is beside it, and however long it is
    assert torch.equal(uniforms(3, [7], 20)[:, 0], numbers[:20, 1])
    assert not torch.equal(uniforms(4, [7], 50)[:, 0], numbers[:, 1])
    # evenly spread over prompts, in every step
    means = uniforms(0, range(4000), 8).mean(1)
    assert torch.allclose(means, torch.full((8,), 0.5), atol=0.02)


def test_the_ends_of_the_random_numbers_draw_tokens_that_have_a_mass():
    logits = torch.tensor([[-torch.inf, 1.0, 3.0, 2.0, -torch.inf, -torch.inf]]).repeat(3, 1)
    # the largest fp32 below 1, and, as rounding may make it, 1 itself
    uniform_B = torch.tensor([0.0, 1 - 2.0**-24, 1.0])
    for how in ({}, {"top_k": 3}, {"top_p": 0.999}):
        config = SampleConfig(temperature=1.0, **how)
        assert choose(logits.clone(), config, uniform_B).tolist() == [2, 1, 1]
    config = SampleConfig(temperature=1.0, top_k=2)
    assert choose(logits.clone(), config, uniform_B).tolist() == [2, 3, 3]


def test_answers_do_not_depend_on_what_is_answered_beside_them(speaker):
    prompts = ids_of(speaker, *QUESTIONS)
    together = []
    for batch in (1, 2, 5):
        speaker.asked = 0
        config = SampleConfig(temperature=1.0, max_new=12, batch=batch)
        together.append(speaker.answer_all(prompts, config))
    assert together[0] == together[1] == together[2]


def test_ids_beyond_the_tokenizer_are_never_drawn(speaker, monkeypatch):
    prefill = speaker.model.prefill

    def padded(*args):
        return torch.cat([prefill(*args), torch.full((1, 7), 1e9)], 1)

    monkeypatch.setattr(speaker.model, "prefill", padded)
    ((ids, _),) = speaker.answer(ids_of(speaker, "copy a"), greedy(1))
    assert ids[0] <= 96


def test_the_seed_decides(speaker):
    prompts = ids_of(speaker, *QUESTIONS)

    def draw(seed):
        speaker.seed = seed
        speaker.asked = 0
        return speaker.answer(prompts, SampleConfig(temperature=1.0, max_new=12))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_batches_draw_on(speaker):
    """Eight times the same prompt, four a batch: the second batch is not the first again."""
    prompts = ids_of(speaker, "copy a b c d") * 8
    answers = speaker.answer_all(prompts, SampleConfig(temperature=3.0, max_new=12, batch=4))
    assert answers[:4] != answers[4:]


def test_a_prompt_near_the_contexts_end_beside_one_with_room(speaker, monkeypatch):
    monkeypatch.setattr(speaker, "stops", ())
    prompts = [[1] + [5] * 119, *ids_of(speaker, "copy a b c")]
    answers = speaker.answer(prompts, greedy(60))
    assert [len(ids) for ids, _ in answers] == [8, 60]
    assert answers[1] == speaker.answer(prompts[1:], greedy(60))[0]


def test_the_cache_holds_what_it_must():
    cache = KVCache(SIZES["toy"], 2, 10)
    assert cache.k_LBGSE.shape == (3, 2, 3, 10, 32)


# ---- the prompt


def test_conditions_and_templates(toy_run, speaker):
    def ask(**how):
        """The whole prompt as text, special tokens too."""
        ids = Speaker(toy_run / "hf", **how).ids([Message("user", "copy a")])
        return "".join(speaker.tokenizer.piece(i) for i in ids).replace("\u2581", " ")

    assert ask() == "<s> GPT4 User: copy a<|end_of_turn|> GPT4 Assistant:"
    assert ask(condition="GPT3") == "<s> GPT3 User: copy a<|end_of_turn|> GPT3 Assistant:"
    assert ask(template="base") == "<s> copy a"
    for how in (dict(condition="GPT5"), dict(template="chatml")):
        with pytest.raises(ValueError, match="GPT3|<.im_end.>"):
            ask(**how)


def test_a_directory_without_crlft_json_needs_a_condition_or_template(toy_run, tmp_path):
    for file in (toy_run / "hf").iterdir():
        if file.name not in ("crlft.json", "manifest.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="--condition NAME or --template NAME"):
        Speaker(tmp_path)
    assert Speaker(tmp_path, condition="GPT3").condition == "GPT3"


def test_a_prompt_longer_than_the_context_stops_or_is_cut_on_the_left(speaker):
    long = [Message("user", "a " * 200)]
    with pytest.raises(ValueError, match="the context 128.*--truncate_left"):
        speaker.ids(long)
    cut = speaker.ids(long, truncate_left=True, max_new=28)
    (whole,) = ids_of(speaker, "a")
    assert len(cut) == 100
    assert cut[0] == 1
    assert cut[-5:] == whole[-5:]
    assert speaker.cut == 1
    # half the context at least
    assert len(speaker.ids(long, truncate_left=True, max_new=512)) == 64
    speaker.cut = 0


# ---- files and the terminal


ROWS = [
    {"prompt": "copy a b", "id": 7},
    {"messages": [{"role": "user", "content": "sort b a"}]},
    {"prompt": "copy a b", "note": "\u2028"},
    {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "sort b a"},
        ]
    },
]


def sample(*words):
    main([str(word) for word in words])


def test_files_in_and_out(toy_run, tmp_path):
    source = tmp_path / "in.jsonl"
    target = tmp_path / "out.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    source.write_text("\n".join(lines), encoding="utf-8")
    how = "--temperature", 0, "--max_new", 5
    sample(toy_run / "hf", "--input", source, "--output", target, *how)
    got = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    answers = []
    for row in got:
        assert row.pop("finish") in ("stop", "length")
        answers.append(row.pop("response"))
    assert got == ROWS
    assert answers[0] == answers[2] != ""
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}

    # the run's folder will do
    out, _ = call("sample.py", toy_run, "--prompt", "copy a b", *how)
    assert out.strip() == answers[0]


def test_prompts_of_a_file_that_were_cut_are_counted(toy_run, tmp_path, capsys):
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"prompt": "a " * 200}) + "\n")
    files = "--input", source, "--output", tmp_path / "out.jsonl"
    sample(toy_run / "hf", *files, "--truncate_left", "--max_new", 5)
    assert "1 prompts cut on the left" in capsys.readouterr().err


def test_streaming_prints_the_answer_once(speaker, capsys, monkeypatch):
    plan = iter([*speaker.tokenizer.encode("a b c d"), speaker.tokenizer.eot])
    monkeypatch.setattr("sample.choose", lambda logits, config, uniform: torch.tensor([next(plan)]))
    (ids,) = ids_of(speaker, "copy a b c d")
    assert say(speaker, ids, GREEDY) == (speaker.tokenizer.encode("a b c d"), "stop")
    assert capsys.readouterr().out == "a b c d\n"


# ---- conditions side by side


def one_at_a_time(speaker, prompt, answer):
    """The mean log-probability of an answer, by feeding its tokens singly through the cache."""
    said = [*answer.ids, speaker.tokenizer.eot] if answer.finish == "stop" else answer.ids
    logits_BV, cache = speaker.prefill([prompt], steps=len(said))
    logprobs = []
    for token in said:
        logprobs.append(logits_BV[0].double().log_softmax(-1)[token].item())
        logits_BV = speaker.model.decode(torch.tensor([token]), cache)
    return sum(logprobs) / len(said)


def test_mean_logprobs_are_those_of_tokens_fed_one_at_a_time(speaker):
    prompts = ids_of(speaker, *QUESTIONS)
    answers = [
        Answer([5, 6, 7], "stop"),
        Answer([5, 6, 7], "length"),
        Answer([], "stop"),
        Answer([9] * 20, "length"),
        Answer([5], "stop"),
    ]
    want = [one_at_a_time(speaker, *pair) for pair in zip(prompts, answers)]
    for batch in (1, 2, 5):
        assert speaker.mean_logprobs(prompts, answers, batch) == pytest.approx(want, abs=1e-5)
    # whether the end of turn counts, and after which prompt, shows
    assert abs(want[0] - one_at_a_time(speaker, prompts[0], answers[1])) > 1e-2
    assert abs(want[0] - one_at_a_time(speaker, prompts[1], answers[0])) > 1e-4


# ---- answers that survive


@pytest.mark.parametrize("condition", ["GPT4", "GPT3,GPT4"])
def test_answers_survive_and_end_as_if_uninterrupted(
    toy_run, tmp_path, condition, monkeypatch, capsys
):
    source = tmp_path / "in.jsonl"
    rows = [{"prompt": f"copy {' '.join('abcdefgh'[: 1 + i % 8])}"} for i in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ["--temperature", 1, "--max_new", 9, "--batch", 3, "--condition", condition]
    whole = tmp_path / "whole.jsonl"
    sample(toy_run / "hf", "--input", source, "--output", whole, *how)

    target = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    words = toy_run / "hf", "--input", source, "--output", target, *how
    kept = 0
    for batches in (2, 1):
        with stopped_after(batches, monkeypatch):
            with pytest.raises(KeyboardInterrupt):
                sample(*words)
        kept += 3 * batches
        said = capsys.readouterr().err
        assert f"{kept} answers are kept in {partial}; the same command goes on" in said
        assert not target.exists()
        # killed in the middle of a line
        partial.write_bytes(partial.read_bytes() + b'{"part": "GPT4", "ro')
    # whole lines that a reader can read
    row = json.loads(partial.read_text().splitlines()[1])
    assert row.keys() == {"part", "row", "text", "finish", "ids"}

    # another command is refused by what differs, and leaves all as it is
    before = partial.read_bytes()
    for flags, message in (
        (["--temperature", 0.5], "made with temperature 1.0, not 0.5"),
        (["--seed", 1], "made with seed 0, not 1"),
        (["--batch", 4], "made with batch 3, not 4"),
        (["--condition", "GPT3"], "made with condition"),
    ):
        line = refused(main, *words, *flags)
        assert message in line
        assert f"the command used then resumes its {kept} answers" in line
    source.write_text(source.read_text().replace("copy a b", "sort a b"))
    assert "made with prompts" in refused(main, *words)
    source.write_text(source.read_text().replace("sort a b", "copy a b"))
    assert partial.read_bytes() == before

    sample(*words)
    assert target.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_a_file_of_answers_that_is_none_or_is_broken(toy_run, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "copy a"}\n{"prompt": "copy b"}\n')
    target = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    words = toy_run / "hf", "--input", source, "--output", target, "--batch", 1, "--max_new", 3
    with stopped_after(1, monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            sample(*words)
    good = partial.read_text()
    head, answer = good.splitlines()
    for text, message in (
        ("my notes", "not a file of answers"),
        ("my notes\n", "partial:1: not JSON"),
        ("{}\n", "partial:1: no began"),
        (good + "[]\n", "partial:3: not a JSON object"),
        (good + '{"part": 1}\n', "partial:3: part = 1 is not a text"),
        (good.replace('"ids": [', '"ids": [97, '), "partial:2: ids are no list of token ids"),
        (good.replace('"ids": [', '"ids": [-1, '), "partial:2: ids are no list of token ids"),
        (good.replace('"row": 0', '"row": -1'), "partial:2: row = -1"),
        (good.replace('"finish": "', '"finish": "x'), "is not stop or length"),
    ):
        if text != good:
            partial.write_text(text)
            line = refused(main, *words)
            assert message in line
            assert "remove the file to begin again" in line
            assert partial.read_text() == text
    # cut short in its first line: nothing was kept
    partial.write_text(head[:30])
    sample(*words)
    assert len(target.read_text().splitlines()) == 2
    assert not partial.exists()


def test_two_processes_do_not_write_one_file_of_answers(tmp_path):
    with KeptAnswers(tmp_path / "out", {"seed": 0}, 97) as kept:
        kept.part("a").add([0], [Answer([5], "stop")], ["e"])
        with pytest.raises(ValueError, match="out.partial is being written by another process"):
            KeptAnswers(tmp_path / "out", {"seed": 0}, 97).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_ctrl_c_and_sigkill_of_a_process(toy_run, tmp_path):
    """As at a keyboard: 400 prompts, stopped while they are answered, by either signal."""
    source = tmp_path / "in.jsonl"
    rows = [{"prompt": f"copy {' '.join('abcdefgh'[: 1 + i % 8])}"} for i in range(400)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = toy_run / "hf", "--input", source, "--batch", 4, "--temperature", 1, "--output"
    sample(*words, tmp_path / "whole.jsonl")
    target = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    command = [sys.executable, "sample.py", *map(str, words), str(target)]
    kept = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not partial.exists() or partial.read_text().count("\n") < kept + 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate()
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert "the same command goes on" in said
            assert "Traceback" not in said
        kept = partial.read_text().count("\n")
    sample(*words, target)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- text that is not UTF-8


def test_what_is_typed_into_a_chat_may_be_no_utf8(toy_run, speaker, monkeypatch, capsys):
    typed = iter(["copy a \udcff", "copy \udce9", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    chat(speaker, greedy(4))
    said = capsys.readouterr()
    assert said.err.count("U+FFFD") == 1


def test_a_row_with_half_a_character_is_refused_before_any_work(toy_run, tmp_path):
    source = tmp_path / "in.jsonl"
    files = "--input", source, "--output", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "copy \\ud83d"}\n')
    assert "in.jsonl:2: " in refused(main, toy_run / "hf", *files)
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "in.jsonl:2: " in refused(main, toy_run / "hf", *files)
    # of another field, which would be written at the end
    source.write_text('{"prompt": "a", "note": "\\udc00"}\n')
    assert "in.jsonl:1: " in refused(main, toy_run / "hf", *files)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_refusal_of_an_input_names_both_forms(toy_run, tmp_path):
    source = tmp_path / "in.jsonl"
    files = "--input", source, "--output", tmp_path / "out.jsonl"
    for row in ({"text": "a"}, {"prompt": 7}, "a", None):
        source.write_text(json.dumps(row))
        line = refused(main, toy_run / "hf", *files)
        assert 'in.jsonl:1: a prompt is {"prompt": "text"}, or {"messages": [' in line


def answered(toy_run, tmp_path, *words):
    """The rows of --output for ROWS."""
    source = tmp_path / "in.jsonl"
    target = tmp_path / "out.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    source.write_text("\n".join(lines), encoding="utf-8")
    how = "--temperature", 1, "--max_new", 9, "--batch", 3, "--seed", 5
    sample(toy_run / "hf", "--input", source, "--output", target, *how, *words)
    text = target.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_each_condition_answers_as_it_does_alone_whatever_the_order(toy_run, tmp_path):
    together = answered(toy_run, tmp_path, "--condition", "GPT4,GPT3")
    assert together == answered(toy_run, tmp_path, "--condition", "GPT3, GPT4")
    for name in ("GPT4", "GPT3"):
        alone = answered(toy_run, tmp_path, "--condition", name)
        for row, together_row in zip(ROWS, together, strict=True):
            response = dict(together_row["responses"][name])
            del response["logprob"]
            # a row of a single condition is what it was before there could be several
            assert alone.pop(0) == row | response
            assert {**row, "responses": together_row["responses"]} == together_row


def test_logprobs_in_a_file_are_of_the_answer_under_each_prompt(toy_run, tmp_path):
    rows = answered(toy_run, tmp_path, "--condition", "GPT4,GPT3")
    _, prompts = read_prompts(tmp_path / "in.jsonl", None)
    speakers = {name: Speaker(toy_run / "hf", name, seed=5) for name in ("GPT4", "GPT3")}
    ids = {}
    for name, speaker in speakers.items():
        ids[name] = [speaker.ids(messages) for messages, _ in prompts]
    differ = 0
    for name, speaker in speakers.items():
        config = SampleConfig(temperature=1, max_new=9, batch=3)
        for i, answer in enumerate(speaker.answer_all(ids[name], config)):
            response = rows[i]["responses"][name]
            assert response["response"] == speaker.text(answer.ids)
            want = {other: one_at_a_time(speaker, ids[other][i], answer) for other in speakers}
            assert response["logprob"] == pytest.approx(want, abs=1e-4)
            differ += abs(want["GPT4"] - want["GPT3"]) > 3e-4
    assert differ > 4


def test_a_prompt_under_two_conditions_is_a_table(toy_run, tmp_path, capsys):
    how = "--condition", "GPT4,GPT3", "--temperature", 0, "--max_new", 5
    sample(toy_run / "hf", "--prompt", "copy a b", *how)
    lines = capsys.readouterr().out.splitlines()
    (source := tmp_path / "in.jsonl").write_text('{"prompt": "copy a b"}')
    sample(toy_run / "hf", "--input", source, "--output", tmp_path / "out.jsonl", *how)
    responses = json.loads((tmp_path / "out.jsonl").read_text())["responses"]

    assert lines[0:2] == ["under GPT4:", responses["GPT4"]["response"]]
    assert lines[3:5] == ["under GPT3:", responses["GPT3"]["response"]]
    assert lines[6].split()[-4:] == ["GPT4", "prompt", "GPT3", "prompt"]
    for line, name in zip(lines[7:9], ("GPT4", "GPT3")):
        *_, expert, other = line.split()
        logprob = responses[name]["logprob"]
        assert expert.endswith("*") == (logprob["GPT4"] >= logprob["GPT3"]) != other.endswith("*")
        assert float(expert.rstrip("*")) == pytest.approx(logprob["GPT4"], abs=1e-3)
        assert float(other.rstrip("*")) == pytest.approx(logprob["GPT3"], abs=1e-3)


def test_prompts_cut_under_each_condition_are_counted_once(toy_run, tmp_path, capsys):
    (source := tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 200}))
    files = "--input", source, "--output", tmp_path / "out.jsonl"
    how = "--truncate_left", "--max_new", 5, "--condition", "GPT4,GPT3"
    sample(toy_run / "hf", *files, *how)
    assert "1 prompts cut on the left" in capsys.readouterr().err


TRAINED = {
    "template": "before_speaker",
    "expert": "a",
    "classes": [
        {"name": "a", "condition": "a"},
        {"name": "a,b", "condition": "a,b"},
        {"name": "c:0.1", "condition": "c"},
        {"name": "c:0.2", "condition": "c"},
    ],
}


def test_a_comma_in_a_classes_own_name():
    assert split_conditions(None, TRAINED) == [None]
    assert split_conditions("a,b", TRAINED) == ["a,b"]
    assert split_conditions("a, c", TRAINED) == ["a", "c"]
    # in a directory without crlft.json no name is known
    assert split_conditions("a,b", None) == ["a", "b"]


def test_templates_without_a_condition_cannot_compare():
    refuse = []
    for template in PROMPTS:
        try:
            check_comparison(["a", "c"], template, TRAINED)
        except ValueError as error:
            assert "has no place for a condition" in str(error)
            refuse.append(template)
    assert refuse == ["none", *BASELINES, "openchat", "base"]


def test_comparisons_that_are_refused(toy_run, tmp_path):
    with pytest.raises(ValueError, match="'c:0.1' and 'c:0.2' are one condition; name it once"):
        check_comparison(["c:0.1", "c:0.2"], "before_speaker", TRAINED)

    def fail(*words):
        return refused(main, toy_run / "hf", *words)

    ask = "--prompt", "copy a", "--condition"
    assert "'GPT5' is none of the classes trained with: GPT4, GPT3" in fail(*ask, "GPT4,GPT5")
    assert "GPT4,GPT4: 'GPT4' and 'GPT4' are one" in fail(*ask, "GPT4,GPT4")
    assert "no name at one side of a comma" in fail(*ask, "GPT4,")
    assert "'base' has no place" in fail(*ask, "GPT4,GPT3", "--template", "base")
    assert "a chat goes on from one answer" in fail("--condition", "GPT4,GPT3")
    # one prompt too long under one of them: nothing is written
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"prompt": "a " * 200}))
    files = "--input", source, "--output", tmp_path / "out.jsonl"
    assert "row 1: the prompt has" in fail(*files, "--condition", "GPT4,GPT3")
    assert list(tmp_path.iterdir()) == [source]


def test_a_batch_too_large_for_the_gpu_is_one_line(toy_run, tmp_path, monkeypatch):
    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    monkeypatch.setattr(Speaker, "generate", generate)
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "copy a"}\n')
    words = "--input", source, "--output", tmp_path / "out.jsonl"
    line = refused(main, toy_run / "hf", *words)
    assert "with 1 prompts of up to" in line
    assert "lower --batch or --max_new" in line
