"""The report, and what is shown while a run goes on."""

import io

import matplotlib.image
from rich.console import Console

from experiments.training.progress import ConsoleProgress
from experiments.training.report import Report, megabytes

ROWS = [
    {"step": 1, "loss": 3.0, "tokens": 32.0, "seconds": 0.5, "skipped": 0},
    {
        "step": 2,
        "loss": 2.0,
        "tokens": 32.0,
        "seconds": 0.5,
        "skipped": 0,
        "validation_loss": 2.5,
        "validation_perplexity": 12.18,
        "validation_bits_per_byte": 1.25,
    },
]
REPORT = Report(
    title="A run",
    facts={"final validation perplexity": "12.18"},
    command="python -m experiments.pretrain",
    next_steps=(("Another method", "python -m experiments.pretrain --optimizer muon"),),
)


def shown(terminal: bool, action) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, highlight=False)
    action(console)
    return stream.getvalue()


def test_report_says_what_was_found_and_what_comes_next(tmp_path):
    path = REPORT.write(tmp_path, ROWS)
    text = path.read_text()
    assert "| final validation perplexity | 12.18 |" in text
    assert "`python -m experiments.pretrain`" in text
    assert "* Another method: `python -m experiments.pretrain --optimizer muon`" in text
    assert "](loss.png)" in text
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.shape[0] > 100 and image.std() > 0
    output = shown(False, REPORT.show)
    assert "12.18" in output and "--optimizer muon" in output


def follow(console: Console) -> None:
    with ConsoleProgress(console, steps=40, done=0) as progress:
        for step in range(1, 5):
            progress.step(ROWS[0] | {"step": step})
        progress.step(ROWS[1] | {"step": 5})


def test_without_a_terminal_there_are_plain_lines():
    lines = shown(False, follow).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 2/40",
        "step 4/40",
        "step 5",
    ]
    assert "loss 3.000, 64 tokens/s" in lines[0]
    assert "perplexity 12.18" in lines[2]


def test_a_terminal_has_a_bar_with_loss_speed_and_counts():
    output = shown(True, follow)
    for part in ("loss 2.000", "64 tokens/s", "5/40", "validation loss 2.5000"):
        assert part in output


def test_megabytes():
    assert megabytes(10_630_000) == "10.63 MB"
