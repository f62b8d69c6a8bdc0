"""The study: same tries for every method, best rate on all seeds, nothing run twice."""

import json
import threading

import pytest

from experiments import pretrain, study
from experiments.presets import parse

TINY = (
    "--steps 4 --eval-every 2 --batch-size 4 --sequence-length 8 --rank 2 "
    "--update-proj-gap 2 --history 2 --validation-tokens 64 --model.vocab-size 280 "
    "--model.hidden-size 8 --model.intermediate-size 8 --model.num-heads 1 "
    "--model.num-layers 1"
).split()


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """A study of two methods; its runs stay in this process and are counted."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"{number} and some more words " * 9)
    monkeypatch.setattr(
        study, "_pretrain", lambda name, args: runs.append(name) or pretrain.main(args)
    )
    monkeypatch.setattr(study, "parse", parse_in_main_thread)
    runs.clear()
    return (
        f"--study-dir {tmp_path}/study --methods adamw galore --factors 0.5 2 "
        f"--seeds 0 1 --workers 1 --data {tmp_path}/*.txt"
    ).split() + TINY


def parse_in_main_thread(args):
    # tyro's parser has one table of names for the whole process.
    assert threading.current_thread() is threading.main_thread()
    return parse(args)


runs: list[str] = []


def test_a_study_tunes_on_the_first_seed_and_compares_on_all(arguments, tmp_path):
    assert study.main(arguments) == 0
    assert len(runs) == len(set(runs)) == 2 * 2 + 2
    folder = tmp_path / "study"
    facts = json.loads((folder / "study.json").read_text())
    tried = facts["tried"]
    for result in facts["results"]:
        rates = [t for t in tried if t["method"] == result["method"]]
        best = min(rates, key=lambda t: t["validation_loss"])
        assert result["learning_rate"] == best["learning_rate"]
        assert result["losses"][0] == best["validation_loss"]
        assert len(result["losses"]) == 2
        assert [point["step"] for point in result["curve"]] == [2, 4]
    adamw, galore = sorted(facts["results"], key=lambda r: r["method"])
    assert 0 < galore["state_bytes"] < adamw["state_bytes"]
    assert f"| {adamw['median']:.4f} |" in (folder / "study.md").read_text()
    assert (folder / "study.png").stat().st_size > 1000

    # A run that was cut is made again, once.
    (folder / "adamw-lr0.001-seed0" / "report.md").unlink()
    for _ in range(2):
        assert study.main(arguments) == 0
        assert len(runs) == 7

    with pytest.raises(ValueError, match="other settings"):
        study.main([*arguments, "--rank", "1"])


def test_a_run_that_fails_says_why(tmp_path):
    args = ["--data", f"{tmp_path}/*.txt", "--run-dir", f"{tmp_path}/run"]
    with pytest.raises(RuntimeError, match=r"broken ended with code 1: error: .*\.txt"):
        study._pretrain("broken", args)
