"""What `train` makes of its settings: rows at a time, and positions."""

import dataclasses
import json
import re

import jax
import pytest
from rich.console import Console

from experiments.data.batches import Share
from experiments.models.huggingface import CheckpointError
from experiments.tinyagent import __main__ as command
from experiments.tinyagent import tools_job
from experiments.tinyagent.job import prepare
from experiments.tinyagent.planner import Planner, WritingConfig
from experiments.tinyagent.presets import parse, parse_tools
from experiments.tinyagent.source import open_llama
from experiments.training.folder import RunFolder
from experiments.training.run import Layout
from tests.experiments import small_encoder
from tests.experiments.tinyagent.small_planner import write_planner

BRIEF = "--brief --other-tools 0 --shown-examples 0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of 600 positions."""
    folder = write_planner(tmp_path_factory.mktemp("hub") / "llama")
    facts = json.loads((folder / "config.json").read_text())
    facts["max_position_embeddings"] = 600
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def layout(place=jax.device_put):
    return Layout(place, Share(), None)


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        ("", 8),
        ("--mesh.fsdp 8", 1),
        ("--mesh.fsdp 2 --mesh.tensor 4", 4),
        ("--batch-size 4", 1),
        ("--batch-size 14", 7),
        ("--rows-at-once 16", 2),
        ("--microbatches 4", 4),
        ("--preset smollm2", 1),
    ],
)
def test_the_published_recipe_works_on_four_prompts_a_device(given, pieces):
    config = parse(given.split())
    assert config.microbatches == pieces
    assert config.microbatch_size == config.run.batch_size // pieces
    # What is recorded is the number alone, as ever.
    recorded = config.as_dict()["run"]
    assert recorded["microbatches"] == pieces and "rows_at_once" not in recorded


def test_an_evaluation_takes_a_microbatch_at_a_time(model, tmp_path):
    rows = []

    def place(batch):
        rows.append(len(batch["tokens"]))
        return jax.device_put(batch)

    losses = {}
    for pieces in (1, 4):
        given = f"--model.name {model} --max-length 600 --microbatches {pieces} {BRIEF}"
        given += " --batch-size 8 --train-examples 8 --validation-examples 10"
        given += " --pad-to-max-length --model.dtype float32 --model.remat none"
        config = parse(given.split())
        made = prepare(config, RunFolder(tmp_path), layout(place), Console(quiet=True))
        params = jax.jit(made.parts.init_params)(jax.random.key(0))
        losses[pieces] = made.evaluate(params)["validation_loss"]
    assert rows == [8] * 2 + [2] * 5
    assert losses[4] == pytest.approx(losses[1], rel=1e-6)


def test_an_encoder_of_tools_predicts_a_microbatch_at_a_time(tmp_path, monkeypatch):
    model = small_encoder.write_encoder(tmp_path / "hub", "roberta", classes=None)
    given = f"--model.name {model} --max-length 16 --microbatches 8"
    given += " --train-examples 8 --validation-examples 10"
    asked = []
    monkeypatch.setattr(
        tools_job, "make_predict", lambda *given: asked.append(given[-1])
    )
    config, folder = parse_tools(given.split()), RunFolder(tmp_path / "run")
    tools_job.prepare(config, folder, layout(), Console(quiet=True))
    assert asked == [4]


def test_no_more_tokens_are_trained_on_than_a_model_has_positions(model, capsys):
    given = f"train --model.name {model} --run-dir {model / 'run'} --max-length 601"
    assert command.main(given.split()) == 1
    said = capsys.readouterr().err
    assert re.search(
        r"--max-length 601 is more than the 600 positions of .*llama", said
    )


def test_prompts_leave_room_for_plans(model, tmp_path, capsys):
    given = f"evaluate --model.name {model} --out {tmp_path / 'out.json'} {BRIEF}"
    given += " --test-examples 4 --max-new-tokens 599"
    assert command.main(given.split()) == 1
    said = capsys.readouterr().err
    assert re.search(r"of \d+ tokens and --max-new-tokens 599 .*600 positions", said)
    assert not list(tmp_path.iterdir())


def test_positions_are_those_of_the_scaling(model):
    source = open_llama(str(model), print)
    assert source.positions == 600

    def told(positions, factor=1.0):
        config = dataclasses.replace(source.config, rope_factor=factor)
        facts = source.facts | {"max_position_embeddings": positions}
        return dataclasses.replace(source, config=config, facts=facts)

    assert told(600, 4.0).positions == 2400
    assert told(None).positions is None
    with pytest.raises(CheckpointError, match="max_position_embeddings is 'many'"):
        _ = told("many").positions
    prompts, config = ["x" * 87, "y"], WritingConfig(max_new_tokens=12)
    Planner(None, told(100)).check(prompts, config)  # of 88 tokens, with that in front
    Planner(None, told(None)).check(prompts, config)
    with pytest.raises(ValueError, match=r"88 tokens .* 12 .* model's 99 positions"):
        Planner(None, told(99)).check(prompts, config)
