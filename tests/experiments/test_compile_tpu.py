"""The real step compiles without a state; costs, limits and errors are told."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import compile_tpu
from experiments.compiled import program
from experiments.compiled.program import (
    compile_step,
    lower_step,
    on_topology,
    topology_devices,
)
from experiments.compiled.table import markdown
from experiments.presets import parse
from experiments.training.chips import known_chip
from experiments.training.throughput import flops_per_token

TINY = (
    *("--model.vocab-size", "256", "--model.hidden-size", "64"),
    *("--model.intermediate-size", "128", "--model.num-layers", "3"),
    *("--sequence-length", "32", "--batch-size", "16", "--rank", "4"),
    # The default's products are not small beside those of a model as small as this.
    *("--residual", "compensation"),
)
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="libtpu is an option: uv run --group tpu"
)


def tiny(*args):
    return parse([*TINY, *args])


def cpus(count):
    return np.array(jax.devices()[:count])


# ------------------------------------------------------------------------- the costs


@functools.cache
def compile_tiny(*args, refresh, devices=4):
    config = on_topology(tiny(*args), devices)
    return config, compile_step(config, cpus(devices), refresh)


def test_a_step_costs_what_its_model_does():
    config, costs = compile_tiny(refresh=False)
    tokens = config.run.batch_size * config.text.sequence_length
    model = tokens * flops_per_token(config.model, 32) / 4
    assert costs.model_flops == model
    # The layers' loop counts in full; projections and residual are the rest.
    assert 1.0 <= costs.flops / model < 1.1
    assert costs.unknown_loops == 0
    assert costs.sent["all-gather"] > 0
    assert costs.memory == (
        costs.arguments + costs.temporaries + costs.outputs + costs.code
    )


def test_what_is_recomputed_shows_against_the_models_figure():
    _, none = compile_tiny("--optimizer", "adamw", refresh=None)
    _, layer = compile_tiny(
        "--optimizer", "adamw", "--model.remat", "layer", refresh=None
    )
    assert none.flops == pytest.approx(none.model_flops, rel=1e-6)
    assert layer.model_flops == none.model_flops
    assert 1.2 < layer.flops / layer.model_flops < 1.34  # all but the output layer


def test_arguments_are_the_state_and_the_batch():
    config, costs = compile_tiny("--optimizer", "adamw", refresh=None, devices=1)
    params = config.model.vocab_size * 64 * 2 + 3 * (4 * 64**2 + 3 * 64 * 128) + 7 * 64
    tokens, weights = 16 * 33 * 4, 16 * 32 * 4
    counters = 4 * 5
    assert costs.arguments == pytest.approx(
        3 * 4 * params + tokens + weights + counters, abs=64
    )
    assert costs.outputs < 1000  # the state's buffers are used again


def test_a_refresh_is_a_program_of_its_own():
    _, steady = compile_tiny(refresh=False)
    _, refresh = compile_tiny(refresh=True)
    assert refresh.flops > steady.flops
    assert refresh.unknown_loops > 0  # iterations: more of them at a cold start


def test_the_update_alone_has_no_model_in_it():
    config = on_topology(tiny(), 4)
    update = compile_step(config, cpus(4), False, update_only=True)
    adamw = on_topology(tiny("--optimizer", "adamw"), 4)
    nothing = compile_step(adamw, cpus(4), None, update_only=True)
    assert nothing.flops == 0 and not nothing.sent
    elements = 3 * (4 * 64**2 + 3 * 64 * 128)
    rank = config.optimization.rank
    assert update.flops == pytest.approx(4 * elements * rank / 4, rel=0.2)
    _, whole = compile_tiny(refresh=False)
    # The gradient in place of the batch.
    params = elements + 7 * 64 + 2 * 256 * 64
    batch = 16 * 33 * 4 + 16 * 32 * 4
    grown = 4 * update.arguments - 4 * whole.arguments
    assert grown == pytest.approx(4 * params - batch, rel=0.05)


def test_packed_batches_have_segments():
    _, costs = compile_tiny("--sequences", "packed", refresh=False)
    _, joined = compile_tiny("--sequences", "joined", refresh=False)
    assert costs.arguments - joined.arguments == 16 * 33 * 4 / 4


# ------------------------------------------------------------------------ the command


def test_the_mesh_is_all_fsdp_unless_one_is_given():
    assert on_topology(tiny(), 8).mesh.fsdp == 8
    given = tiny("--mesh.data", "2", "--mesh.fsdp", "4")
    assert on_topology(given, 8) is given
    with pytest.raises(ValueError, match="8 devices, the topology 16"):
        on_topology(given, 16)
    with pytest.raises(ValueError, match="multiple"):
        on_topology(tiny(), 32)  # a batch of 16


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is there")
def test_without_libtpu_the_error_names_the_command(capsys):
    assert compile_tpu.main(["--model", "demo"]) == 1
    error = capsys.readouterr().err
    assert "libtpu" in error
    assert "uv run --group tpu python -m experiments.compile_tpu" in error


def test_what_is_compiled_is_what_the_table_says(capsys):
    config, extra = compile_tpu.parse_args(["--method", "adamw"])
    assert config.optimizer == "adamw" and not extra
    for words in (["--preset", "llama_1b"], ["--preset=llama_1b"]):
        with pytest.raises(SystemExit) as stopped:
            compile_tpu.parse_args(words)
        assert stopped.value.code == 2
        assert "--model" in capsys.readouterr().err


def test_wrong_arguments_are_refused_before_compiling(capsys):
    with pytest.raises(SystemExit) as stopped:
        compile_tpu.main(["--model", "demo", "--no-such-flag", "3"])
    assert stopped.value.code == 2
    assert "no-such-flag" in capsys.readouterr().err


@pytest.fixture
def four_chips(monkeypatch):
    """As if libtpu were here; the processes that compile know better."""
    monkeypatch.setattr(compile_tpu, "topology_devices", lambda name: cpus(4))
    for name in program.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # what the command sets is taken back
    monkeypatch.setenv("XLA_FLAGS", "")


def test_a_time_limit_ends_a_compilation_and_the_others_go_on(
    four_chips, tmp_path, capsys
):
    path = tmp_path / "costs.json"
    args = ["--model", "demo", "--compare", "--time-limit", "0.2", "--json", str(path)]
    assert compile_tpu.main(args) == 0
    programs = json.loads(path.read_text())["programs"]
    assert list(programs) == [
        "natural_galore",
        "natural_galore, steady",
        "natural_galore, refresh",
        "adamw",
        "optax_galore",
    ]
    assert {p["failed"] for p in programs.values()} == {"did not finish in 0.2 s"}
    assert capsys.readouterr().out.count("did not finish") == 5


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is there")
def test_what_a_compilation_dies_of_is_in_the_table(four_chips, capsys):
    args = ["--model", "demo", "--optimizer", "adamw", "--markdown"]
    assert compile_tpu.main(args) == 0
    assert "| adamw | compiling for TPUs needs libtpu" in capsys.readouterr().out


def test_subspace_accumulation_has_one_program(four_chips):
    config, extra = compile_tpu.parse_args(
        "--model demo --optimizer galore --microbatches 2 --accumulate subspace".split()
    )
    (only,) = compile_tpu._programs(config, extra)
    assert only.refresh is None


def test_the_reference_is_told_of_its_refreshes(four_chips):
    config, extra = compile_tpu.parse_args(
        "--model demo --optimizer reference --rank 4".split()
    )
    programs = compile_tpu._programs(config, extra)
    assert [program.refresh for program in programs] == [None, False, True]


def test_a_row_says_each_figure_once():
    result = {
        "compile_seconds": 12.3,
        "code": 4_000_000,
        "arguments": 1_500_000_000,
        "temporaries": 6_500_000_000,
        "outputs": 0,
        "sent": {"all-gather": 2e9, "all-to-all": 1e6, "collective-permute": 2e6},
        "flops": 3e12,
        "unknown_loops": 0,
        "model_flops": 2.4e12,
        "hbm": 16 * 2**30,
    }
    failed = {"failed": "does not fit: Used 20.0G of 15.75G hbm"}
    *_, row, other = markdown({"adamw": result, "galore": failed}).splitlines()
    assert row == (
        "| adamw | 12 | 4 | 1.50 | 6.50 | 47% | 2.000 | 0.000 | 0.000 | 0.003 "
        "| 3.00 | 1.25 |"
    )
    assert other.startswith("| galore | does not fit: Used 20.0G of 15.75G hbm |")
    assert row.count("|") == other.count("|")


# --------------------------------------------------------------------- with a compiler


@needs_libtpu
def test_a_tpu_topology_compiles_end_to_end(tmp_path):
    path = tmp_path / "costs.json"
    args = ["--model", "demo", "--topology", "v5e:2x2", *TINY, "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compile_tpu", *args],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    programs = json.loads(path.read_text())["programs"]
    steady = programs["natural_galore, steady"]
    assert 1.0 <= steady["flops"] / steady["model_flops"] < 1.2
    assert {"all-gather", "reduce-scatter"} <= steady["sent"].keys()
    assert steady["hbm"] == 16 * 2**30


@needs_libtpu
def test_topologies_have_known_chips_and_mistakes_are_explained(monkeypatch):
    for name, value in program.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert known_chip(topology_devices("v5e:2x2")[0].device_kind).name == "v5e"
    assert known_chip(topology_devices("v5p:2x2x1")[0].device_kind).name == "v5p"
    four = topology_devices("v4:2x2x1")
    assert known_chip(four[0].device_kind).name == "v4" and four.size == 4
    # Axes need not be those of the torus.
    split = tiny("--mesh.data", "2", "--mesh.fsdp", "8")
    for name in ("v6e:4x4", "v5p:2x2x4"):
        lower_step(split, topology_devices(name), None)
    with pytest.raises(ValueError, match=r"'tpu-64'.*v5e:4x4"):
        topology_devices("tpu-64")
