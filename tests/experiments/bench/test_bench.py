"""One command measures everything and leaves JSON, tables and plots."""

import json

import jax
import pytest

from experiments.bench import __main__ as command
from experiments.bench import energy, limits, memory
from experiments.bench.config import BenchConfig
from experiments.bench.limits import Rates
from experiments.bench.records import Row, Task
from experiments.bench.results import Results
from experiments.bench.table import markdown
from experiments.compiled.program import Costs
from tests.experiments.bench.tiny import MODEL, SETTINGS, tiny


def costs(config, devices, refresh):
    """Costs of the training step that is run, which is not compiled."""
    assert devices.size == 1 and refresh is None
    size = 10**6 * (5 if config.optimization.optimizer == "adamw" else 7)
    return Costs(1.0, 1, 2, size, 3, {}, 1.0, 0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of a bench of all parts on a tiny model."""
    root = tmp_path_factory.mktemp("bench")
    for number in range(20):
        (root / f"{number}.txt").write_text(f"{number} and some more words " * 9)
    text = ["--data", f"{root}/*.txt", "--bench-dir", str(root / "out")]
    chosen = ["--optimizers", "adamw", "optax_galore", "galore"]
    chosen += ["--rank", "2", "--growth-histories", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            command, "measure_rates", lambda: limits.measure_rates(1 << 12, 16)
        )
        # The others are tested by themselves, and take long to compile.
        kept = {name: energy._PROJECTORS[name] for name in ("1 iteration", "exact")}
        patch.setattr(energy, "_PROJECTORS", kept)
        patch.setattr(memory, "compile_step", costs)
        cached = jax.config.jax_enable_compilation_cache
        assert command.main([*SETTINGS, *MODEL, *text, *chosen]) == 0
        assert not jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", cached)
    return root / "out"


def test_json_holds_every_sample_and_how_it_was_made(folder):
    facts = json.loads((folder / "bench.json").read_text())
    assert facts["format"] == 1
    assert "--natural-rank 2" in facts["command"]
    assert facts["environment"]["device"]["platform"] == "cpu"
    assert facts["environment"]["versions"].keys() >= {"python", "jax", "optax"}
    assert facts["environment"]["date"].endswith("+00:00")
    assert facts["config"]["extra"][:2] == MODEL[:2]
    assert facts["rates"]["stream"] > 0
    assert set(facts["seconds"]) >= {"state: demo", "update: stacked, float32"}
    assert facts["loads"].keys() == facts["seconds"].keys()
    for row in facts["rows"]:
        assert row["error"] is None, row
        assert row["figures"]
        assert all(isinstance(v, float) for v in row["figures"].values())
    assert {row["part"] for row in facts["rows"]} == set(BenchConfig.parts)
    (mine,) = (
        row
        for row in facts["rows"]
        if (row["part"], row["optimizer"]) == ("update", "galore")
    )
    assert len(mine["samples"]["update"]) == 2
    verdicts = {target["verdict"] for target in facts["targets"]}
    assert verdicts <= {"reached", "not reached", "not measured"}
    assert "reached" in verdicts


def test_each_part_says_what_it_is_for(folder):
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    by_part: dict = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    step = {row["optimizer"]: row["figures"] for row in by_part["step"]}
    assert step["adamw"]["amortised_ratio"] == 1
    assert "refresh_ms" not in step["adamw"]
    assert "gap" not in step["adamw"]
    refresh = step["galore"]["refresh_ms"]
    assert refresh > 0
    # Every second step refreshes: MODEL's gap.
    spread = (step["galore"]["steady_ms"] + refresh) / 2
    assert step["galore"]["gap"] == 2
    assert step["galore"]["amortised_ms"] == pytest.approx(spread)
    assert step["galore"]["alone_ratio"] > 0
    layers = {row["figures"]["layers"] for row in by_part["compile"]}
    assert layers == {1, 2}
    assert all(row["figures"]["instructions"] > 10 for row in by_part["compile"])
    memory = {row["optimizer"]: row["figures"] for row in by_part["memory"]}
    assert memory["adamw"]["temporaries_mb"] == 5
    assert memory["galore"]["temporaries_mb"] == 7
    assert memory["galore"]["memory_mb"] == pytest.approx(7.000006)
    energy = [row for row in by_part["energy"] if row["optimizer"] == "1 iteration"]
    assert {row["figures"]["rank"] for row in energy} == {2}
    assert all(row["figures"]["refreshes"] == 2 for row in energy)
    growth = {row["optimizer"]: row["figures"] for row in by_part["growth"]}
    # A rank above the smaller side is left out, and one point has no exponent.
    assert growth.keys() == {
        *("history 2", "rank 2", "layers 1", "layers 2", "layers, all"),
    }
    # All but the counters doubles.
    assert 0.9 < growth["layers, all"]["exponent_of_bytes"] <= 1


def test_the_report_shows_targets_tables_and_plots(folder):
    report = (folder / "bench.md").read_text()
    assert report.startswith("# Bench\n\nMade by `")
    for name in ("update", "refresh", "step", "compile", "energy", "growth"):
        assert f"]({name}.png)" in report
        assert (folder / f"{name}.png").stat().st_size > 5000
    for line in report.splitlines():
        if line.startswith("| steady update, galore"):
            assert line.endswith("reached |")
            break
    else:
        pytest.fail("no line on the steady update")
    assert "## Steady update of the hidden matrices: demo, stacked, float32" in report
    widths = {line.count("|") for line in report.splitlines() if "optimizer |" in line}
    assert min(widths) > 3


def test_a_task_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    bench = tiny("--bench-dir", str(tmp_path))
    results = Results("command", ENVIRONMENT, {}, Rates(1e9, {"float32": 1e9}))
    done = Row("memory", "demo", "adamw", figures={"memory_mb": float("nan")})

    def fails():
        raise MemoryError("9 GB | more\nsecond line")

    tasks = [
        Task("compile", "compile: galore", fails, "galore"),
        Task("memory", "memory: adamw", lambda: [done]),
    ]
    command.work(tasks, results, bench, command.Console(quiet=True))
    assert [row.error for row in results.rows] == ["MemoryError: 9 GB | more", None]
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["rows"][0]["optimizer"] == "galore"
    assert facts["rows"][1]["figures"]["memory_mb"] is None
    # The machine of the tests may be busy; the one described here has two cores.
    results.loads.update(dict.fromkeys(results.loads, 2.9))
    assert results.warning is None and "Others" not in markdown(results, [])
    results.loads["memory: adamw"] = 7.5
    report = markdown(results, [])
    assert "**Others used this machine: load up to 7.5 on 2 cores." in report
    assert "| galore (failed) |" in report
    assert "* galore, compile, model, float32: failed: MemoryError: 9 GB" in report


ENVIRONMENT = {
    "date": "2026-01-01",
    "machine": {"processor": "one", "cores": 2, "load": 0.5},
    "device": {"number": 1, "kind": "card", "platform": "gpu"},
    "versions": {"jax": "1"},
}


def test_what_was_measured_is_kept_when_the_bench_is_interrupted(
    tmp_path, monkeypatch, capsys
):
    row = Row("energy", "demo", "1 iteration", figures={"rank": 1.0}, samples=SAMPLES)

    def interrupted():
        raise KeyboardInterrupt

    tasks = [
        Task("energy", "one", lambda: [row]),
        Task("state", "two", interrupted),
    ]
    monkeypatch.setattr(command, "all_tasks", lambda *_: tasks)
    monkeypatch.setattr(command, "measure_rates", lambda: Rates(1e9, {"f": 1e9}))
    assert command.main([*SETTINGS, "--bench-dir", str(tmp_path)]) == 130
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert len(facts["rows"]) == 1
    assert (tmp_path / "bench.md").exists()
    # Another one does not take its place unasked.
    tasks[:] = []
    assert command.main([*SETTINGS, "--bench-dir", str(tmp_path)]) == 1
    assert "--overwrite replaces them" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1
    again = [*SETTINGS, "--bench-dir", str(tmp_path), "--overwrite"]
    assert command.main(again) == 0


SAMPLES = {"mean over matrices": [1.0]}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--no-such-option", "3"], "no-such-option"),
    ],
)
def test_a_mistake_in_the_arguments_is_told(args, said, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(args)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err
