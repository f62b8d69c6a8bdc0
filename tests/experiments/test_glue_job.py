"""What a run on GLUE trains: losses, dropout, recipes, methods."""

import dataclasses
import json
from typing import get_args

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments.configs.optimizer import OptimizerName
from experiments.data.batches import Share
from experiments.data.example_batches import Encoded
from experiments.data.glue import TASKS
from experiments.data.hub import model_folder
from experiments.data.text_files import TextError
from experiments.encoders import make_predict, save_model
from experiments.glue import job
from experiments.glue.job import labels_of, losses_of, make_loss, read_texts
from experiments.glue.presets import parse
from experiments.glue.subject import GLUE
from experiments.models.encoder import functional_encoder
from experiments.models.encoder_checkpoint import load_encoder, read_encoder_config
from experiments.training.folder import RunFolder
from experiments.training.optimizer import matrix_labels
from experiments.training.run import Layout
from tests.experiments import small_encoder
from tests.experiments.glue_files import write_task


def test_losses_by_hand():
    outputs = jnp.array([[0.0, 0.0], [3.0, 1.0]])
    found = losses_of(TASKS["rte"], outputs, np.array([1, 0]))
    np.testing.assert_allclose(found, [np.log(2), np.log1p(np.exp(-2))], rtol=1e-6)
    found = losses_of(TASKS["stsb"], outputs[:, :1], np.array([2.0, 1.0]))
    np.testing.assert_allclose(found, [4, 4])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return small_encoder.write_encoder(folder, "roberta", classes=None)


@pytest.fixture(scope="module")
def encoder(model):
    init_params, apply = functional_encoder(read_encoder_config(model), 2)
    return jax.jit(init_params)(jax.random.key(0)), apply


ENCODED = Encoded(
    [np.arange(4, 4 + length, dtype=np.int32) for length in (5, 9, 3)],
    [np.zeros(length, np.int32) for length in (5, 9, 3)],
    np.array([0, 1, 1], np.int32),
    max_length=16,
)


def test_noise_draws_the_dropout_of_training_and_padding_rows_do_not_count(encoder):
    params, apply = encoder
    loss = jax.jit(make_loss(apply, TASKS["rte"]))
    batch = ENCODED.collate(np.arange(3), 4)

    def at(noise, **changed):
        noisy = {"noise": np.full(4, noise, np.uint32)}
        return [float(x) for x in loss(params, batch | noisy | changed)]

    assert at(1) == at(1) != at(2)
    assert at(1)[1] == 3
    other = batch["labels"].copy()
    other[3] = 1 - other[3]  # of the row that fills up the batch
    assert at(1, labels=other) == at(1)


def test_predictions_are_without_dropout_in_the_order_of_the_examples(encoder):
    params, apply = encoder
    layout = Layout(jax.device_put, Share(), None)
    found = make_predict(apply, layout, 2)(params, ENCODED)
    for row, tokens in enumerate(ENCODED.tokens):
        one = tokens[None], np.array([len(tokens)]), np.zeros_like(tokens)[None]
        expected = jax.jit(apply)(params, *one, None)
        np.testing.assert_allclose(found[row], expected[0], atol=1e-5)


def test_a_saved_model_names_its_task_and_has_all_of_its_tokenizer(
    encoder, model, tmp_path
):
    (model / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    config = parse(["--task", "rte", "--method", "adamw", "--model.name", str(model)])
    folder, shape = RunFolder(tmp_path), read_encoder_config(model)
    params, _ = encoder
    save_model(params, config, shape, labels_of("rte"), model, folder)
    facts = json.loads((folder.model / "config.json").read_text())
    assert facts["finetuning_task"] == "rte"
    assert facts["id2label"] == {"0": "entailment", "1": "not_entailment"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder.model / name).read_bytes() == (model / name).read_bytes()
    assert not (folder.model / "special_tokens_map.json").exists()
    zeros, said = jax.tree.map(jnp.zeros_like, params), []
    again = load_encoder(folder.model, shape, zeros, labels_of("rte"), said.append)
    chex.assert_trees_all_equal(again, params)
    load_encoder(folder.model, shape, zeros, labels_of("qnli"), said.append)
    assert len(said) == 1 and "head is of qnli" in said[0]


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model, tmp_path):
    write_task(tmp_path, "rte", 4)
    given = ["--task", "rte", "--data", str(tmp_path), "--max-length", "16"]
    config, shape = parse(given), read_encoder_config(model)
    texts, _ = read_texts(config, TASKS["rte"], model, shape, print)
    largest = max(int(some.max()) for some in texts.train.tokens)
    small = dataclasses.replace(shape, vocab_size=largest)
    message = f"{model}: .* makes token {largest}, .* has {largest} tokens"
    with pytest.raises(TextError, match=message):
        read_texts(config, TASKS["rte"], model, small, print)


@pytest.mark.parametrize(("more", "rows"), [("", 32), ("--microbatches 8", 4)])
def test_as_many_rows_are_predicted_as_are_trained_on_at_a_time(
    more, rows, model, tmp_path, monkeypatch
):
    write_task(tmp_path, "mrpc", 4)
    given = f"--task mrpc --data {tmp_path} --model.name {model} --max-length 16 {more}"
    asked = []
    monkeypatch.setattr(job, "make_predict", lambda *given: asked.append(given[-1]))
    layout = Layout(jax.device_put, Share(), None)
    config, folder = parse(given.split()), RunFolder(tmp_path / "run")
    job.prepare(config, folder, layout, Console(quiet=True))
    assert asked == [rows]


@pytest.mark.parametrize("name", [*get_args(OptimizerName)])
def test_every_method_takes_a_step_on_an_encoder(name, model):
    given = ["--method", name, "--model.name", str(model), "--max-length", "16"]
    if name == "low_rank":
        with pytest.raises(ValueError, match="low_rank has no kernels"):
            parse(given)
        return
    parts = GLUE.parts(parse([*given, "--rank", "2"]))

    def step(key):
        params = parts.init_params(key)
        state = parts.optimizer.init(params)
        updates, after = parts.optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), params, after, state

    new, params, after, state = jax.eval_shape(step, jax.random.key(0))
    assert new == params and after == state


def test_what_is_frozen_has_no_gradient(model):
    gradients = {}
    for others in ("freeze", "train"):
        given = f"--method adamw --others {others} --model.name {model} --max-length 16"
        parts = GLUE.parts(parse(given.split()))
        params = jax.jit(parts.init_params)(jax.random.key(0))
        batch = ENCODED.collate(np.arange(3), 4) | {"noise": np.ones(4, np.uint32)}
        gradients[others] = jax.jit(jax.grad(parts.loss_fn, has_aux=True))(
            params, batch
        )[0]
    labels = matrix_labels(params, "freeze")
    expected = jax.tree.map(
        lambda g, label: 0 * g if label == "frozen" else g, gradients["train"], labels
    )
    chex.assert_trees_all_close(gradients["freeze"], expected, rtol=1e-5, atol=1e-7)
    assert jnp.any(gradients["train"]["embed_tokens"]["embedding"])


@pytest.mark.parametrize(
    ("name", "run", "rate"), [("paper", (3, 32), 2e-5), ("galore", (30, 16), 3e-5)]
)
def test_the_published_recipes(name, run, rate):
    config = parse(["--preset", name, "--method", "natural_galore"])
    assert (config.run.epochs, config.run.batch_size) == run
    assert config.data.max_length == 512
    given = config.optimization
    assert (given.scale, given.update_proj_gap, given.rank) == (4, 500, 4)
    assert (given.decay, given.warmup_fraction, given.final_fraction) == (
        "linear",
        0,
        0,
    )
    assert config.learning_rate == rate
    assert config.as_dict()["optimization"]["adam_learning_rate"] == rate
    assert given.weight_decay == 0 and given.residual is None
    assert config.model.name == "FacebookAI/roberta-base"


@pytest.mark.parametrize(
    ("method", "rate"),
    [("adamw", 1e-4), ("lora", 1e-3), ("galore", 3e-4), ("natural_galore", 3e-4)],
)
def test_the_recipe_for_two_cores_has_rates_by_method(method, rate):
    config = parse(["--preset", "minilm", "--method", method])
    assert config.learning_rate == rate and config.data.max_length == 64
    given = config.optimization
    assert (given.others, given.adam_learning_rate) == ("freeze", 1e-3)
    assert (given.update_proj_gap, given.scale) == (20, 4)


def test_a_model_is_a_folder_or_the_hub_s(model, monkeypatch):
    assert model_folder(str(model), print) == model
    with pytest.raises(TextError, match=r"is no folder .*OWNER/MODEL"):
        model_folder("no/such/folder", print)
    asked = []

    def download(name, repo_type, allow_patterns):
        assert repo_type == "model"
        asked.append((name, allow_patterns))
        if len(asked) == 1:
            raise ConnectionError("not yet")
        return str(model)

    said = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert model_folder("FacebookAI/roberta-base", said.append) == model
    assert len(asked) == 2 and "hf://FacebookAI/roberta-base" in said[0]
    name, files = asked[0]
    assert name == "FacebookAI/roberta-base"
    assert not any("bin" in pattern or ".py" in pattern for pattern in files)
    assert {"tokenizer_config.json", "special_tokens_map.json"} <= {*files}

    def refuse(name, repo_type, allow_patterns):
        raise PermissionError("gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TextError, match=r"hf://FacebookAI/roberta-base: .*gated"):
        model_folder("FacebookAI/roberta-base", print)
