"""Broken input for every entry point: tests/fuzz.py, a few of each target, and many (long)."""

import os

import fuzz
import pytest

# of each target, in `make test`; fewer of those that load a model or a checkpoint
FEW = 40
FEW_OF = {"checkpoint": 8, "checkpoint_flip": 8, "vouched": 8, "run_folder": 8}
FEW_OF |= {"export": 16, "export_flip": 16, "metrics": 16}
# here nothing may be accepted, or little is
HARDLY_ACCEPTED = "prepared_flip", "export_flip", "checkpoint_flip", "vouched", "paths"


@pytest.fixture(scope="module")
def desk(toy, toy_run):
    return fuzz.Desk(toy, toy_run)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_few_inputs_of_each_target(desk, name):
    number = FEW_OF.get(name, FEW)
    result = fuzz.fuzz(desk, name, seed=0, number=number)
    assert result.inputs == number
    assert not result.examples
    # if all were refused by their first byte, nothing would be shown
    assert result.accepted or name in HARDLY_ACCEPTED


def test_a_broken_promise_is_seen(desk, monkeypatch, tmp_path):
    """The fuzzer's own eyes: a traceback, a second line, a left-over, a hang, a wrong result."""

    def case_of(main, **how):
        main.__module__ = "sample"
        return fuzz.outcome(fuzz.Case(main, [], **how), tmp_path)

    def raises(error):
        def main(argv):
            raise error

        return main

    def leaves(argv):
        (tmp_path / "left").touch()
        raise ValueError("no")

    def hangs(argv):
        while True:
            pass

    def wrong():
        raise AssertionError("two and two")

    monkeypatch.setattr("fuzz.HANGS", 0.2)
    assert case_of(raises(ValueError("no"))) == ("refused", "sample.py: no")
    assert case_of(lambda argv: None) == ("accepted", "")
    assert "KeyError" in case_of(raises(KeyError("x")))[1]
    assert "characters" in case_of(raises(SystemExit("sample.py: " + "x" * 5000)))[1]
    assert "not one line" in case_of(raises(SystemExit("sample.py: a\nb")))[1]
    assert "not one line" in case_of(raises(SystemExit("no name")))[1]
    assert "exit 3" in case_of(raises(SystemExit(3)))[1]
    assert "left or changed ['left']" in case_of(leaves)[1]
    assert "Hung" in case_of(hangs)[1]
    assert "two and two" in case_of(lambda argv: None, check=wrong)[1]
    assert "flipped" in case_of(lambda argv: None, must_refuse=True)[1]
    assert "refused" in case_of(raises(ValueError("no")), must_accept=True)[1]


# ---- long

# of each target, or as many as fit into the minutes
MANY = 100_000
MINUTES = 15
# of each target as processes of their own
PROCESSES = 100


@pytest.mark.long
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_many_inputs_of_each_target(desk, name):
    """With a seed that no run before had; a failure names it."""
    seed = int.from_bytes(os.urandom(3), "big")
    result = fuzz.fuzz(desk, name, seed, MANY, minutes=MINUTES)
    assert not result.examples, f"python tests/fuzz.py --seed {seed} {name}: {result.examples}"


@pytest.mark.long
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_inputs_as_processes(desk, name):
    """Exit codes and what is really printed: as a user would see it."""
    for i in range(PROCESSES):
        verdict, why = fuzz.one(desk, name, 1, i, way=fuzz.outcome_of_process)
        assert verdict != "unexpected", f"{name} {i}: {why}"
