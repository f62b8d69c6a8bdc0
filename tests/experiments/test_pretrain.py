"""The command: from text files to a report, interrupted and resumed on the way."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import command, kill_test, pretrain
from experiments.data.hub import UnreachableError
from experiments.data.text_files import TextError
from experiments.files import alone
from experiments.models.functional import functional_llama
from experiments.models.llama_checkpoint import load_llama, read_llama_config
from experiments.presets import parse, preset
from experiments.pretrain import main
from experiments.training.checkpoint import BucketError, SaveError
from experiments.training.distributed import (
    OtherProcessError,
    OtherProcessPassingError,
)
from experiments.training.folder import RunFolder
from experiments.training.metrics import read_metrics
from experiments.training.reader import StorageError
from experiments.training.report import Report

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "texts"
    kill_test.write_texts(folder)
    return folder


def arguments(texts: Path, run_dir: Path, *more: str) -> list[str]:
    command = (
        f"--sequence-length 16 --batch-size 8 --steps {STEPS} --eval-every 3 "
        "--checkpoint-every 100 --rank 4 --update-proj-gap 2 --history 3 "
        "--validation-tokens 200 --model.vocab-size 300 --model.hidden-size 16 "
        "--model.intermediate-size 24 --model.num-heads 2 --model.num-layers 2"
    )
    paths = ["--data", f"{texts}/*.txt", "--run-dir", str(run_dir)]
    return [*paths, *command.split(), *more]


def load(run_dir: Path, step: int) -> list[np.ndarray]:
    return kill_test.load(RunFolder(run_dir), step)[0]


def rows(run_dir: Path) -> list[dict]:
    return kill_test.rows(RunFolder(run_dir))


@pytest.fixture(scope="module")
def straight(texts, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert main(arguments(texts, run_dir)) == 0
    return run_dir


def test_a_run_leaves_all_that_explains_it(straight, texts):
    table = rows(straight)
    assert [row["step"] for row in table] == list(range(1, STEPS + 1))
    assert table[0]["tokens"] == 8 * 16
    assert table[-1]["validation_loss"] < table[0]["loss"]
    assert table[-1]["validation_perplexity"] == pytest.approx(
        np.exp(table[-1]["validation_loss"])
    )
    config = json.loads((straight / "config.json").read_text())
    assert config["optimization"]["learning_rate"] is not None
    assert config["run"]["run_dir"] == str(straight)
    assert config["corpus"]["documents"] == 60
    report = (straight / "report.md").read_text()
    for part in (
        "final validation perplexity",
        "optimizer state",
        "history 0.01 MB",
        "AdamW",
        f"{straight}/checkpoints/{STEPS}",
        f"{straight}/model",
        "--optimizer adamw",
        f"--data '{texts}/*.txt'",
    ):
        assert part in report
    assert (straight / "loss.png").stat().st_size > 1000
    assert (straight / "checkpoints" / str(STEPS)).is_dir()


def test_the_model_of_the_best_evaluation_is_saved_as_transformers_has_it(straight):
    saved = straight / "model"
    config = read_llama_config(saved)
    facts = json.loads((saved / "config.json").read_text())
    assert (facts["bos_token_id"], facts["max_position_embeddings"]) == (0, 16)
    tokenizer = (straight / "tokenizer.json").read_bytes()
    assert (saved / "tokenizer.json").read_bytes() == tokenizer
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    init_params, _ = functional_llama(config)
    params = load_llama(saved, config, jax.eval_shape(init_params, jax.random.key(0)))
    there = load(straight, STEPS)  # the only checkpoint
    for leaf in jax.tree.leaves(params):
        assert any(
            leaf.shape == other.shape and np.array_equal(leaf, other) for other in there
        )


def test_a_run_that_was_never_finite_ends_without_a_model(
    texts, tmp_path, monkeypatch, capsys
):
    names = ("loss", "perplexity", "bits_per_byte")
    found = {f"validation_{name}": np.nan for name in names}
    monkeypatch.setattr(pretrain, "make_validation", lambda *_: lambda params: found)
    assert main(arguments(texts, tmp_path)) == 0
    assert not (tmp_path / "model").exists()
    assert "No evaluation was finite" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert "nan" in report and "/model" not in report


def test_a_folder_is_one_runs_at_a_time(straight, texts, capsys):
    with alone(straight, ""):
        assert main(arguments(texts, straight, "--auto-resume")) == 1
    assert f"another command is at work in {straight}" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_says_so(straight, texts, monkeypatch, capsys):
    """And is made again by a resume, when there is room."""
    (straight / "report.md").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", full)
        assert main(arguments(texts, straight, "--resume")) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert main(arguments(texts, straight, "--resume")) == 0
    assert (straight / "report.md").exists()


def test_ctrl_c_and_resume_end_where_the_undisturbed_run_does(
    straight, texts, tmp_path
):
    run_dir = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", *arguments(texts, run_dir)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # The first row appears once the second step has been dispatched.
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    saved = rows(run_dir)[-1]["step"]
    assert saved < STEPS
    assert f"Saved step {saved} of {STEPS}" in output
    command = output.splitlines()[-1]
    assert "python -m experiments.pretrain --" in command
    assert command.endswith("--resume")

    assert main(arguments(texts, run_dir, "--resume")) == 0
    assert rows(run_dir) == rows(straight)
    for ours, theirs in zip(load(run_dir, STEPS), load(straight, STEPS), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_is_not_overwritten_unasked(straight, texts, capsys):
    assert main(arguments(texts, straight)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert len(rows(straight)) == STEPS


def test_a_run_does_not_go_on_with_other_text_settings(straight, texts, capsys):
    other = arguments(texts, straight, "--resume", "--validation-tokens", "32")
    assert main(other) == 1
    error = capsys.readouterr().err
    assert "text.validation_tokens: 200 there, 32 now" in error
    assert len(rows(straight)) == STEPS


def test_a_mistake_does_not_cost_the_run_that_would_be_overwritten(
    straight, texts, tmp_path, capsys
):
    wrong_text = ["--data", f"{tmp_path}/none*.txt", "--run-dir", str(straight)]
    assert main([*wrong_text, "--overwrite"]) == 1
    assert main(arguments(texts, straight, "--overwrite", "--rank", "17")) == 1
    assert "rank=17 is larger than a side" in capsys.readouterr().err
    assert len(rows(straight)) == STEPS
    assert (straight / "checkpoints" / str(STEPS)).is_dir()


def test_resuming_with_other_settings_is_refused(straight, texts, capsys):
    code = main(arguments(texts, straight, "--resume", "--adam-learning-rate", "0.1"))
    assert code == 1
    assert "optimization.adam_learning_rate: 0.008 there" in capsys.readouterr().err


def test_resuming_with_other_text_is_refused(straight, texts, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in texts.iterdir():
        (other / path.name).write_text(path.read_text().upper())
    cut = tmp_path / "run"
    # A copy: the tokenizer in the folder is trained again on the other text.
    subprocess.run(["cp", "-r", str(straight), str(cut)], check=True)
    assert main(arguments(other, cut, "--resume")) == 1
    assert "text: " in capsys.readouterr().err


def test_mistakes_are_explained_in_a_line(texts, tmp_path, capsys):
    assert main(["--data", f"{tmp_path}/*.txt", "--run-dir", str(tmp_path / "a")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        main(arguments(texts, tmp_path / "b", "--batch-size", "0"))
    assert "batch_size=0 must be at least 1" in capsys.readouterr().err
    for flag, value, message in (
        ("--b1", "1", "b1=1.0 must be in [0, 1)."),
        ("--b2", "1", "b2=1.0 must be in [0, 1)."),
        ("--momentum", "1", "momentum=1.0 must be in [0, 1)."),
        ("--clip-norm", "0", "clip_norm=0.0 must be positive; None does not clip."),
        ("--clip-norm", "-1", "clip_norm=-1.0 must be positive"),
        ("--learning-rate", "-1", "learning_rate=-1.0 must be at least 0."),
        ("--adam-learning-rate", "-1", "adam_learning_rate=-1.0 must be at least 0."),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments(texts, tmp_path / "b", flag, value))
        assert message in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


@pytest.fixture
def fail(monkeypatch):
    """Lets a run fail."""

    def fail(error):
        def run(*args):
            raise error

        monkeypatch.setattr(command, "run", run)

    return fail


def test_devices_that_are_too_small_are_told_in_a_line(fail, tmp_path, capsys):
    memory = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore lines."
    fail(jax.errors.JaxRuntimeError(memory))
    assert main(["--run-dir", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "9 bytes" in line and "--microbatches" in line
    fail(jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: no room"))
    assert main(["--run-dir", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no room" in line and "--microbatches" in line
    fail(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["--run-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA error"), 75),
        (UnreachableError("the hub is away"), 75),
        (BucketError("HTTP status 503"), 75),
        (StorageError("Stale file handle"), 75),
        (OtherProcessPassingError("process 1: the hub is away"), 75),
        (OtherProcessError("process 1: a bad line"), 1),
        (SaveError("No space left on device"), 1),
        (TextError("no such file"), 1),
    ],
)
def test_the_exit_code_tells_what_may_pass(fail, error, code, tmp_path, capsys):
    fail(error)
    assert main(["--run-dir", str(tmp_path)]) == code
    assert str(error) in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(
    straight, texts, tmp_path, capsys
):
    given = ["--tokenizer", str(straight / "tokenizer.json")]
    small = arguments(texts, tmp_path / "a", *given, "--model.vocab-size", "290")
    assert main(small) == 1
    assert "--model.vocab-size 300" in capsys.readouterr().err


def test_a_preset_sets_shape_and_settings_and_can_be_overridden():
    config = parse(["--preset", "llama_60m", "--steps", "7", "--model.num-layers", "3"])
    assert (config.model.hidden_size, config.model.num_layers) == (512, 3)
    assert (config.optimization.rank, config.run.batch_size) == (32, 512)
    assert (config.run.steps, config.text.sequence_length) == (7, 256)
    assert config.run_dir == Path("runs/llama_60m-natural_galore")
    assert parse([]) == preset("demo")
    assert parse(["--optimizer", "galore"]).optimization.rank == 32
    assert parse([]).optimization.rank == 8
    assert parse(["--optimizer", "adamw"]).run_dir == Path("runs/demo-adamw")


@pytest.mark.parametrize(
    ("name", "rank", "steps"),
    [
        ("llama_60m", 128, 10_000),
        ("llama_130m", 256, 20_000),
        ("llama_350m", 256, 60_000),
        ("llama_1b", 512, 100_000),
    ],
)
def test_published_runs(name, rank, steps):
    config = preset(name, "galore")
    assert (config.optimization.rank, config.run.steps) == (rank, steps)
    assert config.learning_rate == 8e-3
    natural = preset(name)
    assert natural.optimization.rank == natural.model.hidden_size // 16
    assert (config.text.sequence_length, config.run.batch_size) == (256, 512)
    assert config.optimization.warmup_fraction == 0.1
    assert config.optimization.final_fraction == 0.1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--optimizer", "--mesh.fsdp", "--model.dtype", "Peak learning rate"):
        assert part in text


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(SystemExit, match="2"):
        parse(["--batch-size", "6", "--microbatches", "4"])


def test_a_run_whose_checkpoints_are_lost_is_not_begun_again_unasked(
    straight, texts, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    elsewhere = ["--checkpoint-dir", str(tmp_path / "typo")]
    assert main(arguments(texts, run_dir, "--auto-resume", *elsewhere)) == 1
    error = capsys.readouterr().err
    assert "run of other settings" in error and "run.checkpoint_dir" in error
    assert len(rows(run_dir)) == STEPS


def test_the_end_of_a_run_without_its_metrics_is_told(
    straight, texts, tmp_path, capsys
):
    """As on a new machine: the checkpoints are all that is left."""
    run_dir, saved = tmp_path / "run", tmp_path / "saved"
    there = ["--checkpoint-dir", str(saved)]
    assert main(arguments(texts, run_dir, *there)) == 0
    shutil.rmtree(run_dir)
    assert main(arguments(texts, run_dir, "--auto-resume", *there)) == 0
    assert "its metrics are not in this folder" in capsys.readouterr().out


def test_a_report_of_a_run_that_diverged(straight, texts, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    table = read_metrics(run_dir / "metrics.jsonl")
    for name in ("loss", "perplexity", "bits_per_byte"):
        table[-1][f"validation_{name}"] = None
    table[-1]["loss"] = None
    lines = "".join(json.dumps(row) + "\n" for row in table)
    (run_dir / "metrics.jsonl").write_text(lines)
    assert main(arguments(texts, run_dir, "--resume")) == 0
    assert "nan nats per token" in (run_dir / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ("", 1),  # the demo's 16 sequences
        ("--preset llama_60m", 16),
        ("--preset llama_60m --mesh.fsdp 8", 2),
        ("--preset llama_60m --mesh.fsdp 16", 1),
        ("--preset llama_60m --mesh.tensor 8", 16),
        ("--preset llama_60m --batch-size 514", 257),
        ("--preset llama_60m --microbatches 4", 4),
    ],
)
def test_a_device_works_on_few_sequences_at_a_time(arguments, pieces):
    config = parse(arguments.split())
    assert config.microbatches == pieces
    assert config.as_dict()["run"]["microbatches"] == pieces
    assert "microbatches" not in config.identity()


def test_a_run_may_go_on_computing_more_than_once_and_a_study_tells_them_apart():
    once, twice = parse([]), parse(["--model.remat", "layer"])
    assert once.identity() == twice.identity()
    assert once.decisive() != twice.decisive()


def test_the_published_run_of_7b_has_settings_of_its_own():
    found = preset("llama_7b", "galore").optimization
    assert (found.rank, found.update_proj_gap) == (1024, 500)
    assert (found.learning_rate, found.clip_norm) == (5e-3, 1.0)
    assert preset("llama_7b").optimization.clip_norm is None
