"""Arms: methods by name, variants by arguments, all on the same text."""

import dataclasses

import pytest

from experiments.study import arms
from experiments.study.pretraining import PRETRAINING

COMMON = ["--preset", "demo", "--steps", "8"]


def parse_arms(specs, common):
    return arms.parse_arms(specs, common, PRETRAINING)


def test_a_method_is_an_arm_and_arguments_make_one():
    adamw, low = parse_arms(
        ["adamw", "low=--optimizer galore --rank 2 --steps 9"], COMMON
    )
    assert adamw.config.optimization.optimizer == "adamw"
    assert adamw.config.run.steps == 8
    assert (low.name, low.config.optimization.optimizer) == ("low", "galore")
    assert low.config.optimization.rank == 2
    assert low.config.run.steps == 9  # an arm's own arguments win
    run = low.run(1 / 3, 5)
    assert run.name == "low-lr0.00266667-seed5"
    assert run.learning_rate == 0.00266667  # as the records have it


def test_factors_are_on_the_rate_an_arm_names():
    (arm,) = parse_arms(["fast=--optimizer adamw --learning-rate 0.5"], COMMON)
    assert arm.run(2.0, 0).learning_rate == 1.0


def test_settings_say_all_that_decides_what_comes_of_a_run():
    (arm,) = parse_arms(["adamw"], COMMON)
    fingerprints = {"text": "a", "tokenizer": "b"}
    settings = arm.settings(arm.run(1, 0), fingerprints)
    assert settings["fingerprints"] == fingerprints
    assert settings["optimization"]["learning_rate"] == 1e-3
    assert settings["text"]["sequence_length"] == 128
    assert settings["steps"] == 8
    others = [
        arm.settings(arm.run(2, 0), fingerprints),
        arm.settings(arm.run(1, 1), fingerprints),
        arm.settings(arm.run(1, 0), {"text": "c", "tokenizer": "b"}),
    ]
    for change in ("--eval-every 3", "--model.hidden-size 8", "--batch-size 4"):
        (changed,) = parse_arms(["adamw"], [*COMMON, *change.split()])
        others.append(changed.settings(changed.run(1, 0), fingerprints))
    assert all(other != settings for other in others)
    # Neither where it lies nor how often it is saved.
    (moved,) = parse_arms(["adamw"], [*COMMON, "--checkpoint-every", "3"])
    assert dataclasses.replace(moved, config=arm.config) != moved
    assert moved.settings(moved.run(1, 0), fingerprints) == settings


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "needs an arm"),
        (["adam"], "'adam' is no method .*adamw.*'NAME=ARGUMENTS'"),
        (["adamw", "adamw=--rank 3"], "two arms are named adamw"),
        (["a/b=--rank 3"], "'a/b' is to be a folder's name"),
        (["=--rank 3"], "'' is to be a folder's name"),
        (["a=--seed 3"], "--seed is the study's to give"),
        (["a=--run_dir=x"], "--run_dir=x is the study's to give"),
        (
            ["adamw", "a=--sequence-length 64"],
            "a does not learn the same text as adamw",
        ),
        (["adamw", "a=--model.vocab-size 300"], "model.vocab_size: 2048 there, 300"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        parse_arms(specs, COMMON)
