"""sample.py on a real export: against transformers, one prompt against many, files, and what a user can get wrong."""

import dataclasses
import json

import pytest
import torch
from conftest import call

from conversations import Message
from model import KVCache
from sample import SampleConfig, Speaker, choose, main

GREEDY = SampleConfig(temperature=0, max_new=12)


@pytest.fixture(scope="module")
def speaker(toy_run):
    return Speaker(toy_run / "hf")


def ids_of(speaker, *texts):
    return [speaker.ids([Message("user", text)]) for text in texts]


PROMPTS = "copy a b c d", "reverse h g f e d c b", "sort", "shift a a a a a", "a"


def test_logits_of_the_export_in_transformers(toy_run, speaker):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(toy_run / "hf").eval()
    assert theirs.generation_config.eos_token_id == [96, 2]
    for n in (1, 5, 120):
        ids = torch.randint(0, 97, (n,))
        hidden = speaker.model(ids, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        with torch.no_grad():
            assert torch.allclose(
                speaker.model.lm_head(hidden), theirs(ids[None]).logits[0], atol=1e-4
            )


def test_64_greedy_tokens_are_those_of_transformers(toy_run, speaker, monkeypatch):
    """Wherever their two best logits are more than 1e-3 apart; nothing stops the text before."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(toy_run / "hf").eval()
    monkeypatch.setattr(speaker, "stops", ())
    prompts = ids_of(speaker, *PROMPTS)
    for prompt, (got, finish) in zip(
        prompts, speaker.answer(prompts, dataclasses.replace(GREEDY, max_new=64))
    ):
        assert len(got) == 64 and finish == "length"
        with torch.no_grad():
            best = (
                theirs(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1].topk(2).values
            )
            out = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
            )[0, len(prompt) :]
        clear = (best[:, 0] - best[:, 1] > 1e-3).long().cumprod(0).bool()
        assert clear.sum() > 8 and torch.equal(torch.tensor(got)[clear], out[clear])


def test_unequal_prompts_in_one_batch_give_each_prompts_own_text(speaker):
    prompts = ids_of(speaker, *PROMPTS)
    together = speaker.answer(prompts, GREEDY)
    assert together == [speaker.answer([p], GREEDY)[0] for p in prompts]
    assert speaker.answer_all(prompts, dataclasses.replace(GREEDY, batch=2)) == together


def test_an_answer_ends_at_the_turns_end_at_max_new_or_at_the_contexts(speaker, monkeypatch):
    plan = iter([[5, 5], [speaker.tokenizer.eot, 5], [7, 5], [7, 5]])
    monkeypatch.setattr("sample.choose", lambda logits, config, generator: torch.tensor(next(plan)))
    answers = speaker.answer(
        ids_of(speaker, "copy a", "sort b"), dataclasses.replace(GREEDY, max_new=4)
    )
    assert answers == [([5], "stop"), ([5, 5, 5, 5], "length")]
    monkeypatch.undo()
    monkeypatch.setattr(speaker, "stops", ())
    prompt = [1] + [5] * 120
    assert len(speaker.answer([prompt], dataclasses.replace(GREEDY, max_new=50))[0][0]) == 128 - 121


def test_choose():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(4000, 1)
    draw = lambda **how: (
        torch.bincount(
            choose(logits.clone(), SampleConfig(**how), torch.Generator().manual_seed(0))[:],
            minlength=4,
        )
        / 4000
    )
    assert draw(temperature=0).tolist() == [0, 1, 0, 0]
    assert torch.allclose(draw(temperature=1.0), logits[0].softmax(0), atol=0.03)
    assert torch.allclose(draw(temperature=0.5), (logits[0] * 2).softmax(0), atol=0.03)
    assert torch.allclose(
        draw(temperature=1.0, top_k=2),
        torch.tensor([-torch.inf, 3, -torch.inf, 2]).softmax(0),
        atol=0.03,
    )
    # Masses 0.64, 0.24, 0.09, 0.03: the set that reaches 0.7 is the first two; 0.6 is reached by
    # the first.
    assert torch.allclose(
        draw(temperature=1.0, top_p=0.7),
        torch.tensor([-torch.inf, 3, -torch.inf, 2]).softmax(0),
        atol=0.03,
    )
    assert draw(temperature=1.0, top_p=0.6).tolist() == [0, 1, 0, 0]


def test_ids_beyond_the_tokenizer_are_never_drawn(speaker, monkeypatch):
    decode = speaker.model.prefill
    padded = lambda *args: torch.cat([decode(*args), torch.full((1, 7), 1e9)], 1)
    monkeypatch.setattr(speaker.model, "prefill", padded)
    assert (
        speaker.answer(ids_of(speaker, "copy a"), dataclasses.replace(GREEDY, max_new=1))[0][0][0]
        <= 96
    )


def test_the_seed_decides(speaker):
    prompts = ids_of(speaker, *PROMPTS)

    def draw(seed):
        speaker.generator.manual_seed(seed)
        return speaker.answer(prompts, SampleConfig(temperature=1.0, max_new=12))

    assert draw(1) == draw(1) and draw(1) != draw(2)


def test_batches_draw_on(speaker):
    """Eight times the same prompt, four a batch: the second batch is not the first again."""
    answers = speaker.answer_all(
        ids_of(speaker, "copy a b c d") * 8, SampleConfig(temperature=3.0, max_new=12, batch=4)
    )
    assert answers[:4] != answers[4:]


def test_a_prompt_near_the_contexts_end_beside_one_with_room(speaker, monkeypatch):
    monkeypatch.setattr(speaker, "stops", ())
    prompts = [[1] + [5] * 119, *ids_of(speaker, "copy a b c")]
    answers = speaker.answer(prompts, dataclasses.replace(GREEDY, max_new=60))
    assert [len(ids) for ids, _ in answers] == [8, 60]
    assert answers[1] == speaker.answer(prompts[1:], dataclasses.replace(GREEDY, max_new=60))[0]


def test_conditions_and_templates(toy_run, speaker):
    text = lambda ids: "".join(speaker.tokenizer.piece(i) for i in ids).replace("\u2581", " ")
    ask = lambda **how: text(
        Speaker(toy_run / "hf", **how).ids([Message("user", "copy a")], system=how.get("system"))
    )
    assert ask() == "<s> GPT4 User: copy a<|end_of_turn|> GPT4 Assistant:"
    assert ask(condition="GPT3") == "<s> GPT3 User: copy a<|end_of_turn|> GPT3 Assistant:"
    assert ask(template="base") == "<s> copy a"
    for how in (dict(condition="GPT5"), dict(template="chatml")):
        with pytest.raises(ValueError, match="GPT3|before_speaker"):
            ask(**how)


def test_a_directory_without_crlft_json_needs_a_condition_or_template(toy_run, tmp_path):
    for file in (toy_run / "hf").iterdir():
        if file.name not in ("crlft.json", "manifest.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="--condition NAME or --template NAME"):
        Speaker(tmp_path)
    assert Speaker(tmp_path, condition="GPT3").condition == "GPT3"


def test_a_prompt_longer_than_the_context_stops_or_is_cut_on_the_left(speaker):
    with pytest.raises(ValueError, match="the context 128.*--truncate_left"):
        ids_of(speaker, "a " * 200)
    cut = speaker.ids([Message("user", "a " * 200)], truncate_left=True, max_new=28)
    whole = ids_of(speaker, "a")[0]
    assert len(cut) == 100 and cut[0] == 1 and cut[-5:] == whole[-5:] and speaker.cut == 1
    # half the context at least
    assert len(speaker.ids([Message("user", "a " * 200)], truncate_left=True, max_new=512)) == 64
    speaker.cut = 0


def test_files_in_and_out(toy_run, tmp_path, capsys):
    rows = [
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
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    sample = lambda *words: main(list(map(str, words)))
    sample(
        toy_run / "hf", "--input", source, "--output", target, "--temperature", 0, "--max_new", 5
    )
    got = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    assert [
        {key: value for key, value in row.items() if key not in ("response", "finish")}
        for row in got
    ] == rows
    assert (
        all(row["finish"] in ("stop", "length") for row in got)
        and got[0]["response"] == got[2]["response"] != ""
    )
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    # the run's folder will do
    out, _ = call("sample.py", toy_run, "--prompt", "copy a b", "--temperature", 0, "--max_new", 5)
    assert out.strip() == got[0]["response"]
    capsys.readouterr()
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 200}) + "\n")
    sample(
        toy_run / "hf",
        "--input",
        tmp_path / "long.jsonl",
        "--output",
        target,
        "--truncate_left",
        "--max_new",
        5,
    )
    assert "1 prompts cut on the left" in capsys.readouterr().err


def test_streaming_prints_the_answer_once(speaker, capsys, monkeypatch):
    from sample import say

    ids = [*speaker.tokenizer.encode("a b c d"), speaker.tokenizer.eot]
    plan = iter(ids)
    monkeypatch.setattr(
        "sample.choose", lambda logits, config, generator: torch.tensor([next(plan)])
    )
    assert say(speaker, ids_of(speaker, "copy a b c d")[0], GREEDY) == "a b c d"
    assert capsys.readouterr().out == "a b c d\n"


def test_the_cache_holds_what_it_must():
    from model import SIZES

    cache = KVCache(SIZES["toy"], 2, 10)
    assert cache.k_LBGSE.shape == (3, 2, 3, 10, 32)
