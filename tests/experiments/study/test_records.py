"""study.json: what went in comes out, and nothing else is taken for it."""

import dataclasses
import json
import math

import pytest

from experiments.study.arms import parse_arms
from experiments.study.pretraining import PRETRAINING
from experiments.study.records import Records
from experiments.study.runs import Record, Run
from experiments.study.subject import Shared

FINGERPRINTS = {"text": "abc", "tokenizer": "def"}
SHARED = Shared(FINGERPRINTS)


def arm(spec="adamw", *arguments):
    (one,) = parse_arms([spec], ["--steps", "4", *arguments], PRETRAINING)
    return one


ARM = arm()


def record(rate=1.0, seed=0, losses=(3.123456789, 2.0), **more) -> Record:
    run = ARM.run(rate, seed)
    return Record(
        run=run,
        settings=ARM.settings(run, FINGERPRINTS),
        curve={
            "step": [2, 4],
            "tokens": [64, 128],
            "seconds": [20.5, 41.0],
            "validation_loss": list(losses),
        },
        state_bytes={"all": 100, "matrices": 10},
        parameters={"all": 50, "matrices": 5},
        versions={"jax": "1"},
        **more,
    )


def records(folder, *found) -> Records:
    kept = Records(folder / "study.json", "study", seeds=[0, 1], commands=["a 'b'"])
    for one in found:
        kept.add(one)
    return kept


def test_records_come_back_with_six_digits(tmp_path):
    kept = records(tmp_path, record(), record(seed=1, diverged="not finite"))
    read = Records.read(kept.path)
    assert (read.kind, read.seeds, read.commands) == ("study", [0, 1], ["a 'b'"])
    assert set(read.runs) == set(kept.runs)
    first = read.runs[ARM.run(1, 0)]
    assert first.curve["validation_loss"] == [3.12346, 2.0]
    assert first.settings == kept.runs[first.run].settings
    assert (first.final_loss, first.seconds) == (2.0, 41.0)
    assert read.runs[ARM.run(1, 1)].final_loss == math.inf
    read.check([ARM], PRETRAINING, SHARED)
    # Written again it is the same file.
    before = kept.path.read_bytes()
    read.write()
    assert kept.path.read_bytes() == before


def test_a_line_a_run_in_an_order_of_its_own(tmp_path):
    runs = [record(rate, seed) for rate in (2, 1) for seed in (1, 0)]
    kept = records(tmp_path, *runs)
    lines = kept.path.read_text().splitlines()
    found = [json.loads(line.rstrip(",")) for line in lines if '"arm"' in line]
    assert [(line["learning_rate"], line["seed"]) for line in found] == [
        (0.001, 0),
        (0.001, 1),
        (0.002, 0),
        (0.002, 1),
    ]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("losses", "final"), [((3.0, None), math.inf), ((None, 2.5), 2.5)]
)
def test_a_loss_that_is_not_finite_is_infinite(losses, final):
    assert record(losses=losses).final_loss == final


def test_other_settings_are_refused_by_name(tmp_path):
    kept = records(tmp_path, record())
    with pytest.raises(ValueError, match=r"fingerprints.text: 'abc' there, 'x' now"):
        kept.check([ARM], PRETRAINING, Shared(FINGERPRINTS | {"text": "x"}))
    longer = arm("adamw", "--steps", "5")
    with pytest.raises(
        ValueError, match=r"adamw-lr0.001-seed0 .*steps: 4 there, 5 now"
    ):
        kept.check([longer], PRETRAINING, SHARED)
    other = arm("other=--optimizer adamw", "--steps", "5")
    kept.check([other], PRETRAINING, SHARED)  # another arm's
    # Which may have other settings, but stands in one table with this one.
    with pytest.raises(ValueError, match=r"adamw-lr0.001-seed0 .*text: 'abc' there"):
        kept.check([other], PRETRAINING, Shared(FINGERPRINTS | {"text": "x"}))
    small = arm("other=--optimizer adamw --preset small")
    with pytest.raises(ValueError, match=r"preset: 'demo' there, 'small' now"):
        kept.check([small], PRETRAINING, SHARED)


def test_settings_that_are_newer_than_a_record_had_their_defaults_then(tmp_path):
    old = record()
    del old.settings["optimization"]["history"]
    del old.settings["model"]["remat"]
    kept = records(tmp_path, old)
    kept.check([ARM], PRETRAINING, SHARED)
    changed = arm("adamw", "--history", "3")
    with pytest.raises(ValueError, match=r"optimization.history: 20 there, 3 now"):
        kept.check([changed], PRETRAINING, SHARED)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    kept = records(tmp_path, record())
    before = kept.path.read_bytes()
    bad = dataclasses.replace(record(seed=1), parameters={"all": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        kept.add(bad)
    assert kept.path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[]",
        '{"config": {}, "results": []}',  # before there were records
        '{"format": 0, "runs": []}',
        '{"format": 1, "kind": "study", "seeds": [], "commands": [], "runs": [{}]}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no study.json of this version"):
        Records.read(path)


def test_a_file_must_know_the_seeds_of_its_runs(tmp_path):
    kept = records(tmp_path, record(), record(seed=5))
    with pytest.raises(ValueError, match="seeds lacks 5"):
        Records.read(kept.path)
    with pytest.raises(FileNotFoundError, match="study-dir"):
        Records.read(tmp_path / "none.json")
    assert Run("adamw", 0.001, 5) in kept.runs
