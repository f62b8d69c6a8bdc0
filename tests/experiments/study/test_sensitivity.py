"""One setting at a time: around the defaults, at a rate that is held."""

import pytest

from experiments.study import report, sensitivity
from experiments.study.records import Records
from tests.experiments.study.fake_runs import MODEL, write_texts


@pytest.fixture
def command(tmp_path, runs):
    data = write_texts(tmp_path / "texts")

    def vary(*more: str) -> int:
        return sensitivity.main(
            [
                *f"--study-dir {tmp_path}/here --seeds 0 1 --workers 1".split(),
                *("--data", data, *MODEL, *more),
            ]
        )

    return vary


def test_each_value_runs_once_at_the_rate_that_is_held(command, runs, tmp_path):
    several = ["--vary", "rank=1,2,8", "--vary", "damping=0.001,1e-1,0.10"]
    assert command(*several[:3], "damping=1e-3,1e-1", "--learning-rate", "8e-3") == 0
    at = "lr0.008-seed"
    assert set(runs.started) == {
        f"{arm}-{at}{seed}"
        for arm in ("natural_galore", "rank=1", "rank=8", "damping=0.1")
        for seed in (0, 1)
    }
    assert len(runs.started) == 8
    page = (tmp_path / "here" / "sensitivity.md").read_text()
    # 3 + 1 for the rate + 0.1 / rank + 1 / 4 steps, and 0.01 for seed 1.
    assert "| rank | 1 | 4.3550 | 2 | 4.3500 to 4.3600 |" in page
    assert "| rank | **2** | 4.3050 | 2 | 4.3000 to 4.3100 |" in page
    assert "| rank | 8 | 4.2675 | 2 | 4.2625 to 4.2725 |" in page
    assert page.index("| rank | 1 |") < page.index("| rank | **2** |")
    assert "| damping | **0.001** | 4.3050 |" in page and "| damping | 0.1 |" in page
    assert "Learning rate 0.008, held for all" in page
    assert "such as scale" in page
    picture = tmp_path / "here" / "sensitivity.png"
    assert picture.stat().st_size > 10_000

    # More values are added; the page is made again from study.json alone.
    del runs.started[:]
    more = ["--vary", "residual=None,fira", "--learning-rate", "0.008"]
    assert command(*more) == 0
    assert set(runs.started) == {
        f"residual={value}-{at}{seed}" for value in ("None", "fira") for seed in (0, 1)
    }
    page = (tmp_path / "here" / "sensitivity.md").read_text()
    assert page.index("| residual | None |") < page.index("| residual | fira |")
    picture.unlink()
    assert report.main([str(tmp_path / "here")]) == 0
    assert picture.exists()
    assert (tmp_path / "here" / "sensitivity.md").read_text() == page


def test_other_rates_and_other_kinds_are_refused(command, runs, tmp_path, capsys):
    one = ("--vary", "rank=1", "--seeds", "0")
    assert command(*one) == 0
    assert command(*one, "--learning-rate", "1") == 1
    assert "has runs at learning rate 0.004, not 1" in capsys.readouterr().err
    path = tmp_path / "here" / "study.json"
    path.write_text(path.read_text().replace('"sensitivity"', '"study"', 1))
    assert command(*one) == 1
    assert "is of another kind, study, not sensitivity" in capsys.readouterr().err
    records = Records.read(path)
    records.kind = "sensitivity"
    records.runs = {run: one for run, one in records.runs.items() if "=" in run.arm}
    records.write()
    assert report.main([str(path.parent)]) == 1
    assert "needs runs of a method at its defaults" in capsys.readouterr().err


def test_values_that_diverge_are_shown(command, runs, tmp_path):
    runs.last_loss = {"validation_loss": None}
    assert command("--vary", "history=1,3") == 0
    page = (tmp_path / "here" / "sensitivity.md").read_text()
    assert "| history | **2** | diverged |" in page


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("ranks=1,2", "'ranks=1,2' varies nothing: .*rank, "),
        ("rank", "'rank' varies nothing"),
        ("learning_rate=1", "varies nothing"),
        ("batch_size=1", "varies nothing"),
    ],
)
def test_settings_that_there_are_not_are_refused(vary, message):
    with pytest.raises(ValueError, match=message):
        sensitivity.parse_args(["--vary", vary])


def test_a_setting_that_is_off_can_be_put_on():
    _, arms = sensitivity.parse_args(["--vary", "relative_damping=True,False"])
    assert [arm.name for arm in arms] == ["natural_galore", "relative_damping=True"]
    assert arms[1].config.optimization.relative_damping


def test_without_a_setting_the_usual_ones_are_varied():
    _, arms = sensitivity.parse_args(["--preset", "demo", "--history", "3"])
    names = [arm.name for arm in arms]
    assert names[:5] == ["natural_galore", "rank=1", "rank=4", "rank=16", "rank=32"]
    assert {name.partition("=")[0] for name in names[1:]} == {
        *("rank", "update_proj_gap", "history", "damping", "scale")
    }
    gap = next(arm for arm in arms if arm.name == "update_proj_gap=50")
    assert gap.config.optimization.update_proj_gap == 50
    assert gap.config.optimization.history == 3
