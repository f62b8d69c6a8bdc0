"""The table: every method tuned alike on every task, nothing run twice."""

import contextlib
import json
import math

import pytest

from experiments.glue import __main__ as command
from experiments.glue import table
from experiments.glue.presets import parse
from experiments.study import report
from experiments.study.processes import Processes
from experiments.study.records import Records
from experiments.training.folder import RunFolder
from tests.experiments import small_encoder
from tests.experiments.glue_files import write_task

SCORE = {"sst2": "accuracy", "mrpc": "f1"}
METHODS = ("full=--method adamw", "lora_r2=--method lora --rank 2")


class FakeRuns:
    """Leaves what a run leaves; the best rate of each method is its own.

    Attributes:
        started: Names of the runs, in order.
        breaks: Part of the name of runs whose loss is not finite.
        flat: Whether all rates are as good.
    """

    def __init__(self, glue) -> None:
        self.glue = glue
        self.started: list[str] = []
        self.breaks = None
        self.flat = False

    def __call__(self, arguments, log) -> int:
        config = parse(arguments)
        folder, task = RunFolder(config.run_dir), config.data.task
        self.started.append(folder.path.name)
        log.write_text("")
        folder.checkpoints.mkdir(parents=True)
        fingerprints = self.glue.prepare([config], None, _Quiet()).fingerprints[task]
        examples = {"examples": {"train": 9, "fingerprints": dict(fingerprints)}}
        folder.write_config(config.as_dict() | examples)
        if self.breaks and self.breaks in folder.path.name:
            folder.metrics.write_text("")
            log.write_text("error: step 1: update_norm not finite\n")
            return 1
        rate, seed = config.learning_rate, config.run.seed
        best = 2e-5 if config.optimization.optimizer == "adamw" else 3e-5
        far = 0.0 if self.flat else abs(math.log(rate / best))
        top = 0.9 - 0.1 * far + 0.01 * seed
        rows = [
            {
                "step": 10 * epoch,
                "examples": 320.0,
                "seconds": 5.0,
                "loss": 0.5,
                "validation_loss": 0.4 / epoch,
                # The second epoch is the best one.
                f"validation_{SCORE[task]}": top - 0.05 * abs(epoch - 2),
                **({"validation_accuracy": top - 0.2} if task == "mrpc" else {}),
            }
            for epoch in (1, 2, 3)
        ]
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder.report.write_text("# Report\n")
        return 0


class _Quiet:
    def status(self, *args, **more):
        return contextlib.nullcontext()


@pytest.fixture
def runs(monkeypatch):
    fake = FakeRuns(command.GLUE)

    def run(self, arguments, log):
        assert self._module == "experiments.glue"
        return 143 if self._stopped else fake(arguments, log)

    monkeypatch.setattr(Processes, "run", run)
    return fake


@pytest.fixture
def make(tmp_path, runs):
    model = small_encoder.write_encoder(tmp_path / "bert", "bert", classes=None)
    for task in SCORE:
        write_task(tmp_path / "data", task, 8)

    def make(*more: str) -> int:
        given = (
            f"--task all --tasks mrpc sst2 --seeds 0 1 --workers 1 --max-length 16 "
            f"--model.name {model} --data {tmp_path / 'data'} "
            f"--study-dir {tmp_path / 'table'} --methods"
        )
        return command.main([*given.split(), *METHODS, *more])

    return make


def test_every_method_is_tuned_alike_on_every_task(make, runs, tmp_path, capsys):
    assert make() == 0
    tuning = [
        f"{task}-{method}-lr{rate}-seed0"
        for task in ("mrpc", "sst2")
        for method in ("full", "lora_r2")
        for rate in ("1e-05", "2e-05", "3e-05")
    ]
    assert set(tuning) < set(runs.started)
    # LoRA's best is at the edge: one more is tried, which is worse.
    assert "mrpc-lora_r2-lr4.5e-05-seed0" in runs.started
    assert "mrpc-full-lr2e-05-seed1" in runs.started
    assert len(runs.started) == 2 * (4 + 5)
    text = (tmp_path / "table" / "glue.md").read_text()
    assert "| method | memory, values | memory | MRPC (f1) | SST-2 (accuracy) |" in text
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    # The best epoch's, in per cent: 90 on seed 0, 91 on seed 1.
    assert "| 90.50 (90.0 to 91.0) | 90.50 (90.0 to 91.0) | **90.50** |" in full
    assert "MRPC, accuracy: full 70.50, lora_r2 70.50" in text
    assert "lora_r2: MRPC 3e-05 of 1e-05, 2e-05, 3e-05, 4.5e-05" in text
    assert "Made on cpu by:" in text and "--task all --tasks mrpc sst2" in text
    assert (tmp_path / "table" / "glue.png").stat().st_size > 5000
    assert "| full |" in capsys.readouterr().out

    del runs.started[:]
    assert make() == 0 and not runs.started
    assert make("--seeds", "0", "1", "2") == 0
    assert len(runs.started) == 4 and all("seed2" in name for name in runs.started)
    assert table.main([str(tmp_path / "table")]) == 0
    assert table.main([str(tmp_path / "nowhere")]) == 1


def test_a_cell_of_fewer_seeds_than_others_says_so(make, tmp_path):
    assert make("--tasks", "mrpc", "--seeds", "0") == 0
    assert make("--tasks", "sst2") == 0
    text = (tmp_path / "table" / "glue.md").read_text()
    assert "| 90.00 (1 of 2 seeds) | 90.50 (90.0 to 91.0) | **90.25** |" in text


def test_the_plot_names_a_method_that_has_not_come_to_every_task(make, tmp_path):
    assert make("--tasks", "mrpc", "--methods", "full=--method adamw") == 0
    assert make("--tasks", "sst2") == 0
    records = Records.read(tmp_path / "table" / "study.json")
    (legend,) = table.plot(table.rows_of(records)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["full", "lora_r2"]


def test_of_one_seed_there_is_no_span_and_of_few_rates_no_inside(make, tmp_path):
    few = "--tasks sst2 --seeds 0 --factors 1 1.5 --extensions 0".split()
    assert make(*few) == 0
    text = (tmp_path / "table" / "glue.md").read_text()
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    assert full.endswith("| 90.00 | **90.00** |")
    assert "seed 0 alone. Each best learning rate" in text
    assert make(*few, "--factors", "0.5", "1", "1.5", "2") == 0
    text = (tmp_path / "table" / "glue.md").read_text()
    assert "| lora_r2 | " in text and "An asterisk: the best" in text


def test_memory_is_that_of_weights_and_state(make, tmp_path):
    assert make("--tasks", "sst2") == 0
    records = Records.read(tmp_path / "table" / "study.json")
    full, lora = table.rows_of(records)
    weights = full.any_record.parameters["all"]
    values, count = full.memory
    assert values == pytest.approx(3 * weights, abs=9)
    assert count == pytest.approx(12 * weights, abs=40)
    # Two factors beside each matrix, and two moments of these and of the head.
    sides = small_encoder.LAYERS * 2 * (4 * 32 + 2 * (16 + 24))
    head = 16 * 16 + 16 + 2 * 16 + 2
    values, _ = lora.memory
    assert values == pytest.approx(weights + 3 * sides + 2 * head, abs=9)


def test_a_method_that_diverges_is_worth_nothing(make, runs, tmp_path):
    runs.breaks = "full"
    assert make("--tasks", "sst2") == 0
    text = (tmp_path / "table" / "glue.md").read_text()
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    assert full.endswith("| diverged | **0.00** |")


def test_other_data_than_the_records_is_refused(make, tmp_path, capsys):
    assert make("--tasks", "sst2") == 0
    write_task(tmp_path / "data", "sst2", 10)
    assert make("--tasks", "sst2") == 1
    assert "fingerprints.train" in capsys.readouterr().err


def test_a_tie_goes_to_the_lower_rate(make, runs, tmp_path):
    runs.flat = True
    assert make("--tasks", "sst2", "--extensions", "0") == 0
    seeds = [name for name in runs.started if "seed1" in name]
    assert set(seeds) == {f"sst2-{m}-lr1e-05-seed1" for m in ("full", "lora_r2")}
    path = tmp_path / "table" / "study.json"
    records = Records.read(path)
    records.runs = dict(reversed(records.runs.items()))
    cells = [row.cells["sst2"] for row in table.rows_of(records)]
    assert [len(cell.records) for cell in cells] == [2, 2]


def test_methods_on_other_data_or_models_are_no_comparison(make, capsys):
    assert make("--tasks", "sst2", "--methods", "a=--rank 2", "b=--task mrpc") == 1
    assert "sst2-b" not in (said := capsys.readouterr().err)
    assert "b is not trained on what a is (task: 'sst2' there, 'mrpc' now)" in said
    assert make("--methods", "a=--rank 2", "b=--train-examples 4") == 1
    assert "train_examples: None there, 4 now" in capsys.readouterr().err


def test_a_study_of_another_kind_is_not_reported(make, tmp_path, capsys):
    assert make("--tasks", "sst2") == 0
    assert report.main([str(tmp_path / "table")]) == 1
    assert (
        "is of another kind, glue, not study or sensitivity" in capsys.readouterr().err
    )


def test_the_fingerprint_of_a_task_is_of_its_examples_and_weights(tmp_path):
    model = small_encoder.write_encoder(tmp_path / "bert", "bert", classes=None)
    write_task(tmp_path / "data", "sst2", 8)
    given = ["--model.name", str(model), "--data", str(tmp_path / "data")]
    config = parse(["--task", "sst2", "--max-length", "16", *given])
    first = command.GLUE.prepare([config], tmp_path, _Quiet()).fingerprints["sst2"]
    small_encoder.write_encoder(model, "bert", classes=None, seed=1)
    other = command.GLUE.prepare([config], tmp_path, _Quiet()).fingerprints["sst2"]
    assert first["train"] == other["train"]
    assert first["encoder"] != other["encoder"]
