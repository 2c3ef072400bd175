"""Files that are longer than the memory, and files that are not what they were.

Rows read piece by piece, arrays made by several processes and spooled to the disk; then what a
prepared file must be when it is opened, checked, and read by a run.
"""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_data import TABLE, made_up, prepared
from test_labels import answer, row, write

import data
import train as train_module
from data import PrepareConfig, Prepared, ShowConfig, prepare, show
from support import arrays, makers, rows
from support.arrays import Digest, Spool, digest_of
from support.files import file_sha256
from support.rows import read_chunks, read_rows

# ---- rows, piece by piece


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        max_size=6,
    ),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_an_array_is_the_same_whatever_pieces_it_is_read_in(
    tmp_path_factory, values, size, is_ascii, indent
):
    path = tmp_path_factory.mktemp("array") / "x.json"
    text = json.dumps(values, ensure_ascii=is_ascii, indent=indent)
    path.write_bytes(b"\xef\xbb\xbf\n " + text.encode("utf-8", "replace") + b" \r\n")
    expected = json.loads(text.encode("utf-8", "replace"))
    before = rows.BYTES_OF_A_CHUNK
    rows.BYTES_OF_A_CHUNK = size
    try:
        found = list(read_rows(path))
    finally:
        rows.BYTES_OF_A_CHUNK = before
    assert [value for _, value in found] == expected
    assert [where for where, _ in found] == [f"{path}: conversation {i}" for i in range(len(found))]


@pytest.mark.parametrize(
    "text, problem",
    [
        ('[{"a": 1},\n{"a": }]', ":2: not JSON (Expecting value)"),
        ('[{"a": 1}\n\n{"a": 2}]', ":3: not JSON (Expecting ',' or ']')"),
        ('[{"a": 1},\n]', ":2: not JSON (Expecting value)"),
        ('[{"a": 1}\n', ":2: not JSON (Expecting ',' or ']')"),
        ('[{"a": 1}]\n\n{', ":3: not JSON (Extra data)"),
        ("[\n" + "[" * 100_000, ":2: not JSON (maximum recursion"),
        ("[\n1" + "0" * 5000 + "]", ":2: not JSON (Exceeds the limit"),
        ('["a", \n"b', ":2: not JSON (Unterminated string"),
        (b'["a",\n"b\xff"]', ":2: not UTF-8 (invalid start byte)"),
        (b'{"a": 1}\n{"b": "\xff"}', ":2: not UTF-8 (invalid start byte)"),
    ],
)
def test_what_is_wrong_in_an_array_is_named_with_its_line(tmp_path, monkeypatch, text, problem):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for size in (3, 2**20):
        monkeypatch.setattr(rows, "BYTES_OF_A_CHUNK", size)
        with pytest.raises(ValueError) as stop:
            list(read_rows(path))
        assert f"x.json{problem}" in str(stop.value)


def test_a_file_that_lost_its_newlines_or_a_quote_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_BYTES", 1000)
    monkeypatch.setattr(rows, "BYTES_OF_A_CHUNK", 100)
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' + "x" * 10_000)
    with pytest.raises(ValueError, match="x.jsonl:2: a line of more than 1,000 bytes"):
        list(read_rows(path))
    path.write_text('[{"a": 1},\n"' + "x" * 10_000_000)
    with open(path, "rb") as file:
        with pytest.raises(ValueError, match="x.jsonl:2: not JSON .Unterminated string"):
            list(rows.read_array(file, path))
        assert file.tell() < 20_000


def test_the_bytes_read_rise_to_the_size_of_the_file(tmp_path, monkeypatch):
    """What the bar shows: compressed bytes of a gzipped file."""
    monkeypatch.setattr(rows, "ROWS_OF_A_CHUNK", 10)
    lines = b"".join(b'{"a": "%d"}\n' % random.Random(i).getrandbits(9999) for i in range(100))
    for name, content in (("x.jsonl", lines), ("x.gz", gzip.compress(lines))):
        path = tmp_path / name
        path.write_bytes(content)
        done = [chunk.done for chunk in read_chunks(path)]
        assert len(done) == 10 and len(set(done)) > 2, name
        assert done == sorted(done) and done[-1] == len(content), name


# ---- several processes, one file


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows, and a process for each of --processes."""
    monkeypatch.setattr(rows, "ROWS_OF_A_CHUNK", 3)
    monkeypatch.setattr(makers, "BYTES_OF_A_PROCESS", 1)


def test_the_same_file_whatever_the_number_of_processes(toy, tmp_path, small_chunks):
    """Class ids go by first appearance in the files, whoever parsed them."""
    talks = []
    for i in range(60):
        own = {"condition": f"own {i // 7 * 5 % 4}"} if i % 3 else {"model": f"m{i % 2}"}
        talks.append(row(answer(weight=i / 100) if i % 3 else answer(), score=i, **own))
    files = (
        write(tmp_path / "a.jsonl", *talks[:31]),
        write(tmp_path / "b.jsonl", *talks[31:]),
    )
    flags = {"classes": "m1=A:1,*=none:0.5", "expert": "A"}
    contents = set()
    for processes in (1, 2, 3):
        _, path = prepared(
            tmp_path, files, toy / "tokenizer.model", processes=processes, max_len=12, **flags
        )
        contents.add(path.read_bytes())
    assert len(contents) == 1
    names = [class_.name for class_ in Prepared(path).classes]
    assert names == ["A", "none", "own 0", "own 1", "own 2", "own 3"]
    assert not list(tmp_path.glob(".*"))


def test_the_first_bad_line_stops_whoever_meets_it(toy, tmp_path, small_chunks):
    good = row(model="Model: GPT-4")
    bad = {
        20: row(answer(weight=-1)),
        24: row(condition="own"),
        25: {"messages": []},
    }
    for processes in (1, 2):
        talks = {i: good for i in range(1, 40)} | bad
        for number in bad:
            source = write(tmp_path / "rows.jsonl", *talks.values())
            with open(source, "a") as file:
                file.write("not JSON")
            flags = "--classes", TABLE, "--processes", processes
            flags = *flags, "--tokenizer", toy / "tokenizer.model"
            out = tmp_path / "new" / "folder" / "x.safetensors"
            line = refused(data.main, "prepare", source, *flags, "--out", out)
            assert f"rows.jsonl:{number}: " in line
            talks[number] = good
        source = write(tmp_path / "rows.jsonl", *talks.values())
        with open(source, "a") as file:
            file.write("not JSON")
        assert "rows.jsonl:40: not JSON" in refused(
            data.main, "prepare", source, *flags, "--out", out
        )
        # the folders that it made are gone, too
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_named(toy, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(makers, "in_this_process", die)
    source = write(tmp_path / "rows.jsonl", *[row(model="Model: GPT-4")] * 30)
    with pytest.raises(ValueError, match="a process that tokenizes was killed"):
        prepared(tmp_path, [source], toy / "tokenizer.model", processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rewards_are_compared_with_the_highest_also_if_it_comes_last(toy, tmp_path, small_chunks):
    """Weights so small that they are 0 in fp32 drop a conversation, wherever the highest is."""
    source = write(tmp_path / "rows.jsonl", *[row(score=i) for i in range(20)])
    flags = {"classes": "", "reward": "score", "beta": 0.1}
    for processes in (1, 2):
        meta, path = prepared(
            tmp_path, [source], toy / "tokenizer.model", processes=processes, **flags
        )
        file = Prepared(path)
        # exp(-10 * 11) is below the smallest number of fp32
        assert len(file) == 11
        assert meta["counts"]["none"]["dropped_conversations"] == 9
        assert file.weights.max() == 1 and meta["classes"][0]["weight"] == 1
        assert meta["rewards"]["lowest"] == 0 and meta["rewards"]["answers"] == 20


# ---- the spool


def test_digests_are_those_of_pieces_of_64_mib(monkeypatch):
    monkeypatch.setattr(arrays, "PIECE", 10)
    content = bytes(range(25))
    for cuts in ([25], [10, 15], [3, 7, 0, 9, 6], [1] * 25):
        digest = Digest()
        rest = memoryview(content)
        for cut in cuts:
            digest.update(rest[:cut])
            rest = rest[cut:]
        pieces = [arrays.hashlib.sha256(content[i : i + 10]).digest() for i in (0, 10, 20)]
        assert digest.hexdigest() == digest_of(pieces)


def test_what_a_killed_process_left_is_removed_and_two_at_once_are_not_allowed(toy, tmp_path):
    out = tmp_path / "x.safetensors"
    left = tmp_path / ".x.safetensors.partial"
    left.mkdir()
    (left / "tokens").write_bytes(b"old")
    (left / "lock").touch()
    flags = "--tokenizer", toy / "tokenizer.model", "--classes", TABLE, "--out", out
    with Spool(out):
        assert not (left / "tokens").exists()
        line = refused(data.main, "prepare", toy / "train.jsonl", *flags)
        assert "another process is writing it" in line
        assert (left / "lock").exists()
    assert not list(tmp_path.iterdir())


def test_ctrl_c_and_a_full_disk_leave_nothing_and_say_so(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "x.safetensors"
    flags = "--tokenizer", toy / "tokenizer.model", "--classes", TABLE, "--out", out
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    line = refused(data.main, "prepare", toy / "train.jsonl", *flags)
    assert "x.safetensors: 0.0 GB are to be written, 0.0 GB are free; free space" in line

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = refused(data.main, "prepare", toy / "train.jsonl", *flags)
    assert "x.safetensors: No space left on device; free space or choose another" in line

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Spool, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.main(["prepare", *map(str, (toy / "train.jsonl", *flags))])
    assert f"stopped; nothing is left of {out}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals_while_two_processes_tokenize(assets, tmp_path, number):
    """Ctrl-C reaches all of them; SIGKILL only the first, and the others leave by themselves."""
    rows_of_it = (assets / "conversations" / "mixed_quality.jsonl").read_bytes()
    source = tmp_path / "rows.jsonl"
    source.write_bytes(rows_of_it * 8)
    words = "data.py", "prepare", source, "--tokenizer", assets / "llama2" / "tokenizer.model"
    words = *words, "--classes", TABLE, "--processes", "2", "--out", tmp_path / "x.safetensors"
    command = [sys.executable, *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    spooled = tmp_path / ".x.safetensors.partial" / "tokens"
    while not spooled.exists() or spooled.stat().st_size < 10**6:
        time.sleep(0.05)
        assert process.poll() is None
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err.strip() == f"stopped; nothing is left of {words[-1]}"
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
        return
    process.kill()
    process.wait()
    # a group of processes is gone when nobody is left to send a signal to
    until = time.monotonic() + 20
    while is_there(process.pid):
        assert time.monotonic() < until, "a process outlived the one that started it"
        time.sleep(0.1)
    source.write_bytes(rows_of_it)
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    assert not spooled.parent.exists()
    Prepared(words[-1]).check()


def is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- a prepared file that is not what it was


@pytest.fixture(scope="module")
def tiny(toy, tmp_path_factory):
    """A prepared file of a few conversations, with digests."""
    folder = tmp_path_factory.mktemp("tiny")
    talks = [row(model="Model: GPT-4"), row(model="other \u00e9"), row(answer(weight=1e-5))]
    source = write(folder / "rows.jsonl", *talks)
    _, path = prepared(folder, [source], toy / "tokenizer.model")
    return path


def opened(path):
    """What a run does with its data before it starts, in one process."""
    train_module.check_data(Prepared(path))


def is_found(raw, bit, path):
    """Whether a flipped bit of a file is found, in one line that names the file."""
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        opened(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return True
    return False


def test_flipped_bits_are_found(tiny, tmp_path):
    """In the header, the metadata and each array."""
    raw = tiny.read_bytes()
    file = Prepared(tiny).file
    starts = sorted(stored.start for stored in file.stored.values())
    bounds = [0, 8, 200, *starts, len(raw)]
    chosen = random.Random(0)
    for first, stop in zip(bounds, bounds[1:]):
        for _ in range(40):
            bit = chosen.randrange(8 * first, 8 * stop)
            assert is_found(raw, bit, tmp_path / "x.safetensors"), bit
    opened(tiny)


@pytest.mark.long
def test_every_flipped_bit_is_found(tiny, tmp_path):
    raw = tiny.read_bytes()
    missed = [
        bit for bit in range(8 * len(raw)) if not is_found(raw, bit, tmp_path / "x.safetensors")
    ]
    assert missed == []


def changed(path, to, change):
    """A file as it was prepared before there were digests, after change(arrays, meta)."""
    values = load_file(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    meta = json.loads(header["__metadata__"]["crlft"])
    for name in ("digests", "sha256"):
        meta.pop(name, None)
    change(values, meta)
    save_file(values, to, metadata={"crlft": json.dumps(meta)})
    return to


def put(name, place, value):
    def change(values, meta):
        values[name][place] = value

    return change


def say(**fields):
    def change(values, meta):
        meta.update(fields)

    return change


def unbalanced(values, meta):
    meta["counts"]["GPT4"]["dropped"] += 1


def swapped(values, meta):
    """The sum is right, but each class has the other's."""
    for key in ("trained", "prompt", "tokens_read"):
        meta["counts"]["GPT4"][key], meta["counts"]["GPT3"][key] = (
            meta["counts"]["GPT3"][key],
            meta["counts"]["GPT4"][key],
        )


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda values, meta: values.pop("group"), "has the arrays"),
        (lambda values, meta: values.update(more=values["group"]), "has the arrays"),
        (lambda v, _: v.update(tokens=v["tokens"].astype(np.int64)), "tokens: of type int64"),
        (lambda v, _: v.update(group=v["group"][:-1]), "group: 2 values instead of 3"),
        (lambda v, _: v.update(weights=v["weights"][:-1]), "weights: "),
        (put("offsets", 0, 1), "offsets: not from 0"),
        (put("offsets", -1, 3), "offsets: not from 0"),
        (put("offsets", 1, 1), "offsets: a conversation of fewer"),
        (put("offsets", 1, 2**62), "offsets: a conversation of fewer"),
        (put("class_ids", 0, 2), "class_ids: one that is none of the 2 classes"),
        (put("class_ids", 0, -1), "class_ids: one that"),
        (put("tokens", 3, -1), "tokens: a value that is not from 0 to 96"),
        (put("tokens", 3, 97), "tokens: a value that"),
        (put("weights", 0, 0.5), "weights: a weight on a conversation's first token"),
        (put("weights", 3, np.nan), "weights: a value that is not from 0 to 1,000,000"),
        (put("weights", 3, np.inf), "weights: a value that"),
        (put("weights", 3, -0.5), "weights: a value that"),
        (put("weights", 1, 0.5), "trained on, which is not what its own counts say"),
        (put("tokenizer", 0, 0), "tokenizer: not the bytes of tokenizer_sha256"),
        (unbalanced, "a ledger that adds up"),
        (swapped, "of class GPT4 are trained on, which is not what its own counts say"),
        (say(counts=None), "no counts"),
        (say(expert="x"), "expert = 'x' is not the name of a class"),
        (say(template="x"), "template = 'x' is not one of"),
        (say(max_len=True), "max_len = True is not a whole number"),
        (say(bos=10**30), "bos = 10000"),
        (say(eot=97), "eot = 97 is not a whole number from 0 to 96"),
        (say(classes={}), "classes = {} is not an array"),
        (say(classes=[{"name": "A"}]), "no classes[0].condition"),
        (say(digests={}), "not what was prepared, by their sha256"),
    ],
)
def test_a_file_without_digests_is_checked_field_by_field(tiny, tmp_path, change, problem):
    path = changed(tiny, tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError) as stop:
        opened(path)
        Prepared(path).check()
    assert problem in str(stop.value)
    assert str(stop.value).startswith(str(path))


def test_a_file_without_digests_opens_with_a_line_that_says_so(tiny, tmp_path, capsys):
    path = changed(tiny, tmp_path / "x.safetensors", lambda values, meta: None)
    opened(path)
    assert f"{path}: carries no digests" in capsys.readouterr().out
    show(ShowConfig((str(path),), n=1))
    assert f"{path}: carries no digests" in capsys.readouterr().out
    opened(tiny)
    assert "digests" not in capsys.readouterr().out
    # and stats checks all of it
    changed(tiny, path, put("tokens", 3, -1))
    assert "tokens: a value that" in refused(data.main, "stats", path)
    # show and --dry_run what they print
    assert "tokens: a value that" in refused(data.main, "show", path)
    changed(tiny, path, put("weights", 3, np.nan))
    words = "--dry_run", "--data", path, "--model", "toy", "--batch_tokens", 4096
    assert "weights: a value that" in refused(train_module.main, *words)


def test_two_nodes_must_find_the_same(tiny, monkeypatch):
    found = Prepared(tiny).check_pieces()
    other = dict(found)
    other["tokens", 0] = bytes(32)

    def nodes(second):
        monkeypatch.setattr(
            train_module, "from_all_ranks", lambda mine: [mine, ("1", second, None)]
        )
        opened(tiny)

    nodes(found)
    with pytest.raises(ValueError, match="tokens: not what was prepared"):
        nodes(other)
    # a share of it is missing
    with pytest.raises(ValueError, match="offsets: not what was prepared"):
        nodes({})


def test_ranks_of_a_node_share_the_pieces(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE", 2**12)
    out = tmp_path / "x.safetensors"
    tokenizer = str(toy / "tokenizer.model")
    prepare(PrepareConfig((str(toy / "train.jsonl"),), tokenizer, str(out), TABLE, max_len=128))
    file = Prepared(out)
    shares = [file.check_pieces(part, 3) for part in range(3)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    file.check_digests(shares[0] | shares[1] | shares[2])
    with pytest.raises(ValueError, match="not what was prepared"):
        file.check_digests(shares[0] | shares[1])


# ---- a file that changes while it is read


def test_a_file_that_changes_is_noticed_and_a_replaced_one_is_not_read(tiny, tmp_path):
    path = tmp_path / "x.safetensors"
    shutil.copy(tiny, path)
    file = Prepared(path)
    before = file.batch([0, 1]).tokens_T.tolist()
    # another file takes its name: the one that was opened is still read
    shutil.copy(tiny, tmp_path / "new")
    os.truncate(tmp_path / "new", 100)
    (tmp_path / "new").rename(path)
    assert file.batch([0, 1]).tokens_T.tolist() == before

    shutil.copy(tiny, path)
    for change in (lambda: os.utime(path, (1, 1)), lambda: os.truncate(path, 500)):
        file = Prepared(path)
        change()
        with pytest.raises(ValueError, match="x.safetensors: changed while it is read"):
            file.batch([0])
        shutil.copy(tiny, path)
    # cut short between the look and the reading: an error, and no bus error
    file = Prepared(path)
    os.truncate(path, file.file.stored["tokens"].start)
    with pytest.raises(ValueError, match="x.safetensors: ends at byte .*, within an array"):
        file.conversation(0)


# ---- at scale


def own_memory_of(group):
    """RssAnon, in MiB, of each process of a group."""
    found = []
    for folder in os.listdir("/proc"):
        try:
            if not folder.isdigit() or os.getpgid(int(folder)) != group:
                continue
            lines = open(f"/proc/{folder}/status").read().splitlines()
            found += [int(line.split()[1]) // 1024 for line in lines if "RssAnon" in line]
        except (OSError, ProcessLookupError):
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [5_632, 56_320, 200_000, 1_000_000])
def test_preparing_many_takes_no_more_memory(assets, tmp_path, count, processes):
    """Prints the rows of the table in docs/data.md."""
    lines = (assets / "conversations" / "mixed_quality.jsonl").read_text().splitlines()
    talks = [json.loads(line) for line in lines]
    source = tmp_path / "rows.jsonl"
    with open(source, "w") as file:
        for i in range(count):
            talk = talks[i % len(talks)]
            first, *others = talk["conversations"]
            first = first | {"value": f"{first['value']} ({i // len(talks)})"}
            file.write(json.dumps(talk | {"conversations": [first, *others]}) + "\n")
    out = tmp_path / "x.safetensors"
    words = "data.py", "prepare", source, "--tokenizer", assets / "llama2" / "tokenizer.model"
    words = *words, "--classes", TABLE, "--processes", processes, "--out", out
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    most = 0
    while process.poll() is None:
        most = max([most, *own_memory_of(process.pid)])
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    print(f"\n{count:,} by {processes}: {count / seconds:,.0f} conversations/s, {most} MiB")
    assert process.returncode == 0
    assert most < 600
    Prepared(out).check()


# What a run does before its first step; in MiB of its own memory.
STARTING = """
import sys, time
import train
from recipe import TrainConfig, all_steps
from support.budget import train_flops

def own():
    lines = open("/proc/self/status").read().splitlines()
    return max(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))

before = own()
began = time.process_time()
setup = train.set_up(TrainConfig(data=sys.argv[1], model="llama-2-7b", out="x", epochs=2), None)
print(time.process_time() - began, own() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("count", [281_500, 1_000_000])
def test_many_conversations_start(tmp_path, count):
    """Seconds of two epochs' planning and all before it, and memory, as docs/data.md has them."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.8, count).astype(np.int64), 8, 4096)
    path = made_up(tmp_path / "x.safetensors", lengths)
    done = subprocess.run(
        [sys.executable, "-c", STARTING, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    print(done.stdout)
    *_, last = done.stdout.strip().splitlines()
    seconds, memory = map(float, last.split())
    assert seconds < 15 + 9
    assert memory < 500


def test_the_identity_of_the_data(toy, tiny, tmp_path, train):
    """A file's own sha256; of a file without digests, what it was before, so that runs resume."""
    run = tmp_path / "run"
    words = "--model", "toy", "--steps", 1, "--batch_tokens", 512
    said = train(toy / "train.safetensors", run, *words)
    for word in ("opening", "checking its", "planning 1 epoch of"):
        assert word in said
    settings_of_run = json.loads((run / "run.json").read_text())
    assert settings_of_run["data_sha256"] == Prepared(toy / "train.safetensors").meta["sha256"]
    old = changed(toy / "train.safetensors", tmp_path / "old.safetensors", lambda v, m: None)
    said = train(old, tmp_path / "other", *words)
    assert "carries no digests" in said
    settings_of_run = json.loads((tmp_path / "other" / "run.json").read_text())
    assert settings_of_run["data_sha256"] == file_sha256(old)
