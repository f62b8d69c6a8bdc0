"""The shell recipes, executed: with stand-ins for the cloud, uv and the clock."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"

GCLOUD = r"""
case "$*" in
  *"queued-resources describe"*) cat "$STAND_IN/state" ;;
  *"queued-resources create"*) echo ACTIVE > "$STAND_IN/state" ;;
  *"queued-resources delete"*) rm "$STAND_IN/state" ;;
  *"tpu-vm ssh"*)
    echo >> "$STAND_IN/connections"
    for word; do
      case "$word" in --command=*) cd "$HOME" && bash -c "${word#--command=}" ;; esac
    done ;;
  "storage ls "*) test -e "$STAND_IN/bucket/${3#gs://}" ;;
  "storage cat "*) cat "$STAND_IN/bucket/${3#gs://}" ;;
  "storage rm "*) rm "$STAND_IN/bucket/${3#gs://}" ;;
  "storage rsync "*) ! mkdir "$STAND_IN/failed" 2>/dev/null ;;
  "storage cp gs://"*) cp "$STAND_IN/bucket/${3#gs://}" "$4" ;;
  "storage cp --no-clobber "*) cp -n "$4" "$STAND_IN/bucket/${5#gs://}" ;;
  "storage cp - "*)
    mkdir -p "$(dirname "$STAND_IN/bucket/${4#gs://}")"
    cat > "$STAND_IN/bucket/${4#gs://}" ;;
esac
"""

GIT = """
case "$1" in
  rev-parse) echo abc ;;
  clone) mkdir "$3" ;;
  checkout)
    test ! -e "$STAND_IN/no-commit" || exit 1
    echo "$3" > "$STAND_IN/commit" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder whose commands stand in for others, as long as $STAND_IN/bin exists."""
    for name in ("bin", "home", "bucket"):
        (tmp_path / name).mkdir()
    command(tmp_path, "sleep", "exec /bin/sleep 0.1")
    yield tmp_path
    shutil.rmtree(tmp_path / "bin")


def command(machine, name, script):
    path = machine / "bin" / name
    path.write_text("#!/usr/bin/env bash\n" + script)
    path.chmod(0o755)


@pytest.fixture
def start(machine):
    """Starts a recipe on the machine."""
    started = []

    def start(recipe, **more):
        with (machine / "out").open("a") as out:
            process = subprocess.Popen(
                ["bash", LAUNCH / recipe],
                env=os.environ
                | {"HOME": str(machine / "home"), "STAND_IN": str(machine)}
                | {"PATH": f"{machine}/bin:{os.environ['PATH']}"}
                | more,
                cwd=machine,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(done):
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is Linux's, as TPUs are")
def test_a_tpu_slice_runs_once_and_goes_back_at_the_end(machine, start):
    command(machine, "gcloud", GCLOUD)
    command(machine, "git", GIT)
    command(machine, "curl", "echo 0")
    # The run's folder of another slice, which does not come at the first try.
    (machine / "bucket" / "b" / "llama_7b" / "run").mkdir(parents=True)
    # It crashes once, then trains until it is told that it has.
    crash = 'test "$(wc -l < "$STAND_IN/runs")" -gt 1 || exit 134'
    wait = 'until test -e "$STAND_IN/trained" -o ! -e "$0"; do /bin/sleep 0.02; done'
    lock = '[ "$1" = lock ] && { echo versions > uv.lock; exit; }'
    command(machine, "uv", f'{lock}\necho "$*" >> "$STAND_IN/runs"\n{crash}\n{wait}')
    cloud = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "REPOSITORY": "https://r"}
    first = start("tpu_queued_resource.sh", **cloud)
    until(lambda: lines(machine / "runs") == 2)
    # The run goes on without the script, and is found going on by the next one.
    first.kill()
    first.wait()
    second = start("tpu_queued_resource.sh", **cloud)
    until(lambda: lines(machine / "connections") == 2)
    (machine / "trained").touch()
    assert second.wait(timeout=30) == 0, (machine / "out").read_text()
    assert lines(machine / "runs") == 2
    assert "--auto-resume" in (machine / "runs").read_text()
    assert (machine / "commit").read_text() == "abc\n"
    kept = machine / "bucket" / "b" / "llama_7b" / "uv.lock"
    assert kept.read_text() == "versions\n"
    assert "ended with exit code 0" in (machine / "out").read_text()
    assert not (machine / "state").exists()


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is Linux's, as TPUs are")
def test_a_tpu_slice_without_the_code_goes_back(machine, start):
    command(machine, "gcloud", GCLOUD)
    command(machine, "git", GIT)
    command(machine, "uv", 'echo >> "$STAND_IN/runs"')
    (machine / "no-commit").touch()
    (machine / "bucket" / "b" / "llama_7b").mkdir(parents=True)
    cloud = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "REPOSITORY": "https://r"}
    script = start("tpu_queued_resource.sh", **cloud)
    assert script.wait(timeout=30) == 1, (machine / "out").read_text()
    assert lines(machine / "runs") == 0
    assert not (machine / "state").exists()
    assert "https://r has no commit abc" in (machine / "home" / "run.log").read_text()


def test_a_node_of_gpus_gives_up_what_ends_soon_again_and_again(machine, start):
    command(machine, "uv", 'echo >> "$STAND_IN/runs"\nexit 75')
    assert start("node_8gpu.sh").wait(timeout=60) == 75
    assert lines(machine / "runs") == 21


def test_a_node_of_gpus_starts_again_after_a_crash_and_passes_sigterm_on(
    machine, start
):
    save = "trap '/bin/sleep 0.3; echo >> \"$STAND_IN/saved\"; exit 143' TERM"
    wait = 'while test -e "$0"; do /bin/sleep 0.02; done'
    crash = 'test "$(wc -l < "$STAND_IN/runs")" -gt 1 || kill -SEGV $$'
    command(machine, "uv", f'{save}\necho >> "$STAND_IN/runs"\n{crash}\n{wait}')
    script = start("node_8gpu.sh")
    until(lambda: lines(machine / "runs") == 2)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 143, (machine / "out").read_text()
    assert lines(machine / "saved") == 1 and lines(machine / "runs") == 2
    assert "ended with code 139; starting again" in (machine / "out").read_text()


def test_a_node_of_gpus_starts_again_after_what_may_pass(machine, start):
    command(
        machine,
        "uv",
        'echo >> "$STAND_IN/runs"\ntest "$(wc -l < "$STAND_IN/runs")" -gt 1 || exit 75',
    )
    assert start("node_8gpu.sh").wait(timeout=30) == 0
    assert lines(machine / "runs") == 2


def test_a_node_of_gpus_leaves_mistakes_alone(machine, start):
    command(machine, "uv", 'echo >> "$STAND_IN/runs"\nexit 2')
    assert start("node_8gpu.sh").wait(timeout=30) == 2
    assert lines(machine / "runs") == 1
