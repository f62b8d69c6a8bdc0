"""The command: a random RoBERTa in hub layout, fine-tuned on made-up examples."""

import json
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from experiments import kill_test
from experiments.glue import __main__ as command
from experiments.glue.presets import parse
from experiments.training.folder import RunFolder
from tests.experiments import small_encoder
from tests.experiments.cluster import Cluster
from tests.experiments.glue_files import write_task

EPOCHS, COUNT, AN_EPOCH = 6, 42, 6  # the last batch is not full

SUBMISSION = "predictions/SST-2.tsv"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_encoder.write_encoder(
        tmp_path_factory.mktemp("hub") / "roberta", "roberta", classes=None
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for task in ("mrpc", "sst2", "stsb", "mnli"):
        write_task(folder, task, COUNT)
    return folder


def arguments(model, data, run_dir, task="sst2", *more):
    given = (
        f"--epochs {EPOCHS} --batch-size 8 --max-length 16 --keep-checkpoints 6 "
        "--learning-rate 1e-2 --adam-learning-rate 1e-2 --update-proj-gap 4 "
        "--scale 1 --history 3"
    )
    paths = {"--model.name": model, "--data": data, "--run-dir": run_dir}
    words = [str(word) for pair in paths.items() for word in pair]
    return ["--task", task, *words, *given.split(), *more]


def rows(run_dir):
    return kill_test.rows(RunFolder(run_dir))


def load(run_dir, step):
    """The state in a checkpoint, as nested dictionaries."""
    with ocp.CheckpointManager((run_dir / "checkpoints").resolve()) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(step, args=items)["state"]


@pytest.fixture(scope="module")
def straight(model, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert command.main(arguments(model, data, run_dir)) == 0
    return run_dir


def test_a_run_learns_and_leaves_all_that_explains_it(straight):
    table = rows(straight)
    assert len(table) == EPOCHS * AN_EPOCH
    assert sum(row["examples"] for row in table) == EPOCHS * COUNT
    evaluated = [row for row in table if "validation_accuracy" in row]
    assert [row["step"] for row in evaluated] == [6, 12, 18, 24, 30, 36]
    assert max(row["validation_accuracy"] for row in evaluated) > 0.9
    assert evaluated[-1]["validation_loss"] < evaluated[0]["validation_loss"] - 0.01
    config = json.loads((straight / "config.json").read_text())
    assert config["examples"]["train"] == COUNT
    report = (straight / "report.md").read_text()
    for part in ("| accuracy | ", "of 6 |", "natural_galore, rank 4", "loss.png"):
        assert part in report


def test_predictions_on_the_test_split_are_the_best_epoch_s(straight):
    """Whose score is known, for the made-up splits are the same."""
    lines = (straight / SUBMISSION).read_text().splitlines()
    assert lines[0] == "index\tprediction"
    right = [int(line.split("\t")[1]) == n % 2 for n, line in enumerate(lines[1:])]
    scores = [row.get("validation_accuracy", 0) for row in rows(straight)]
    assert len(right) == COUNT and np.mean(right) == max(scores)


def test_the_best_model_is_saved_as_it_was_loaded(straight, model, data, tmp_path):
    """And goes on from there: the first loss is that of the best epoch, not chance."""
    folder = straight / "model"
    assert (folder / "config.json").exists() and (folder / "tokenizer.json").exists()
    more = ("--epochs", "1", "--learning-rate", "1e-9", "--adam-learning-rate", "1e-9")
    run_dir = tmp_path / "on"
    assert command.main(arguments(folder, data, run_dir, "sst2", *more)) == 0
    best = max(row.get("validation_accuracy", 0) for row in rows(straight))
    assert rows(run_dir)[-1]["validation_accuracy"] == best


def test_a_run_that_is_resumed_ends_as_the_undisturbed_one(
    straight, model, data, tmp_path
):
    """After an epoch: the same order, dropout and optimizer state."""
    run_dir = tmp_path / "cut"
    shutil.copytree(straight, run_dir)
    for step in (12, 18, 24, 30, 36):
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    (run_dir / SUBMISSION).unlink()
    assert command.main(arguments(model, data, run_dir, "sst2", "--resume")) == 0
    assert rows(run_dir) == rows(straight)
    jax.tree.map(np.testing.assert_array_equal, load(run_dir, 36), load(straight, 36))
    assert (run_dir / SUBMISSION).exists()
    other = ("--resume", "--epochs", "7")
    assert command.main(arguments(model, data, run_dir, "sst2", *other)) == 1


@pytest.mark.parametrize(
    ("task", "method", "names"),
    [
        ("mrpc", "relora", {"f1", "accuracy"}),
        ("stsb", "galore", {"pearson", "spearman"}),
        (
            "mnli",
            "adamw",
            {"accuracy", "accuracy_mismatched", "loss_mismatched"},
        ),
    ],
)
def test_tasks_and_methods_by_name(task, method, names, model, data, tmp_path):
    more = ("--method", method, "--epochs", "1")
    assert command.main(arguments(model, data, tmp_path / "run", task, *more)) == 0
    last = rows(tmp_path / "run")[-1]
    found = {n.removeprefix("validation_") for n in last if n.startswith("validation_")}
    assert found == names | {"loss"}
    if task == "mnli":
        assert (tmp_path / "run" / "predictions" / "MNLI-mm.tsv").exists()


def test_lora_trains_factors_and_head_alone(model, data, tmp_path):
    config = parse(arguments(model, data, tmp_path, "sst2", "--method", "lora"))
    assert config.optimization.others == "freeze"
    run_dir = tmp_path / "run"
    more = ("--method", "lora", "--epochs", "1")
    assert command.main(arguments(model, data, run_dir, "sst2", *more)) == 0
    after = load(run_dir, AN_EPOCH)["params"]
    before = load_file(model / "model.safetensors")
    np.testing.assert_array_equal(
        after["embed_tokens"]["embedding"], before["embeddings.word_embeddings.weight"]
    )
    query = after["layers"]["attention"]["q_proj"]
    np.testing.assert_array_equal(
        query["kernel"][0], before["encoder.layer.0.attention.self.query.weight"].T
    )
    np.testing.assert_array_equal(
        query["bias"][1], before["encoder.layer.1.attention.self.query.bias"]
    )
    assert np.abs(query["lora_b"]).max() > 0
    assert np.abs(after["head"]["out_proj"]["bias"]).max() > 0


def test_two_processes_learn_the_same_on_a_mesh(model, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert command.main(arguments(model, data, one, "sst2", "--epochs", "2")) == 0
    more = ("--epochs", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    given = arguments(model, data, two, "sst2", *more)
    with Cluster("experiments.glue", given, tmp_path) as cluster:
        assert cluster.wait() == [0, 0], cluster.output()
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"loss", "gradient_norm", "validation_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
        assert ours.get("validation_accuracy") == theirs.get("validation_accuracy")
    assert (two / SUBMISSION).read_text() == (one / SUBMISSION).read_text()
    for name in ("model/model.safetensors", "report.md"):
        assert (two / name).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-length", "39"), "--max-length 39 is more than the 38 positions"),
        (("--model.name", "no/such/folder"), "is no folder .*OWNER/MODEL"),
        (("--data", "nowhere"), "SST-2/train.tsv is missing"),
        (("--rank", "17"), "rank=17"),
        (
            ("--mesh.tensor", "8", "--mesh.data", "1"),
            "tensor 8 must divide the 4 heads",
        ),
    ],
)
def test_mistakes_are_explained(more, message, model, data, tmp_path, capsys):
    with_more = arguments(model, data, tmp_path / "run", "sst2", *more)
    assert command.main(with_more) == 1
    assert_said(capsys, message)


def test_weights_that_lack_a_tensor_name_it(model, data, tmp_path, capsys):
    broken = small_encoder.write_encoder(tmp_path / "model", "roberta", classes=None)
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, broken / "model.safetensors")
    assert command.main(arguments(broken, data, tmp_path / "run")) == 1
    assert_said(capsys, "no tensor 'encoder.layer.1.output.dense.bias'")


def assert_said(capsys, message):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
