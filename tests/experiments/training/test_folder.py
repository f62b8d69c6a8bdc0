"""Who may write into a run's folder."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from etils import epath

from experiments.training.folder import RunFolder


def claim(folder: RunFolder, *asked: str) -> None:
    names = ("resume", "auto_resume", "overwrite")
    folder.claim(**{name: name in asked for name in names})


def make_run(path, checkpoint_dir=None) -> RunFolder:
    folder = RunFolder(path, checkpoint_dir)
    claim(folder)
    folder.write_config({"steps": 3, "run": {"checkpoint_dir": checkpoint_dir}})
    folder.metrics.write_text("")
    folder.tokenizer.write_text("")
    (folder.path / "tensorboard").mkdir()
    (folder.checkpoints / "3").mkdir(parents=True)
    return folder


def test_a_new_folder_is_made(tmp_path):
    make_run(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_a_run_is_not_overwritten_unasked(tmp_path):
    folder = make_run(tmp_path)
    with pytest.raises(FileExistsError, match=r"--resume .*--overwrite .*--run-dir"):
        claim(folder)
    assert folder.checkpoints.exists()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    folder = make_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    claim(folder, "overwrite")
    assert folder.metrics.exists()
    folder.delete_run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "tokenizer.json"]


def test_a_folder_without_a_run_is_left_alone_by_overwrite(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    claim(RunFolder(tmp_path), "overwrite")
    RunFolder(tmp_path).delete_run()
    assert (tmp_path / "checkpoints").exists()


def test_resume_needs_a_run_and_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        claim(RunFolder(tmp_path / "none"), "resume")
    assert not (tmp_path / "none").exists()
    folder = make_run(tmp_path)
    claim(folder, "resume")
    assert folder.metrics.exists()


def test_auto_resume_takes_a_run_and_makes_one(tmp_path):
    claim(RunFolder(tmp_path / "new"), "auto_resume")
    assert (tmp_path / "new").is_dir()
    folder = make_run(tmp_path / "old")
    claim(folder, "auto_resume")
    assert folder.metrics.exists()


def test_checkpoints_elsewhere_can_be_resumed_in_a_new_folder(tmp_path):
    claim(RunFolder(tmp_path / "new", "gs://bucket/run"), "resume")
    assert (tmp_path / "new").is_dir()


def test_a_buckets_name_stays_a_buckets(tmp_path):
    checkpoints = RunFolder(tmp_path, "gs://bucket/run").checkpoints
    assert checkpoints == epath.Path("gs://bucket/run")
    assert str(checkpoints / "3") == "gs://bucket/run/3"


def test_overwrite_deletes_the_runs_checkpoints_elsewhere_and_nothing_beside(tmp_path):
    elsewhere = tmp_path / "bucket"
    folder = make_run(tmp_path / "run", str(elsewhere))
    for name in ("damaged-2", "4.orbax-checkpoint-tmp", "models", "3d-models"):
        (elsewhere / name).mkdir()
    folder.delete_run()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["3d-models", "models"]


def test_overwrite_leaves_checkpoints_that_are_not_the_runs(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "bucket" / "3").mkdir(parents=True)
    RunFolder(tmp_path / "run", str(tmp_path / "bucket")).delete_run()
    assert (tmp_path / "bucket" / "3").exists()


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the run's folder .*--run-dir"):
        claim(RunFolder(tmp_path / "file" / "run"))


def test_a_read_only_folder_is_found_out_at_once(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"Read-only file system.*--run-dir"):
        claim(RunFolder(tmp_path))


def test_a_full_disk_leaves_the_config_as_it_was(tmp_path, monkeypatch):
    folder = make_run(tmp_path)
    before = folder.config.read_text()

    def full(path, *args):
        with path.open("w") as file:
            file.write("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device.*make room"):
        folder.write_config({"steps": 4})
    assert folder.config.read_text() == before
    assert json.loads(before)["steps"] == 3


def test_a_run_begins_again_only_if_it_had_hardly_begun(tmp_path):
    """Without a checkpoint: the same settings, and few rows of metrics."""
    config = {"run": {"checkpoint_dir": None}, "seed": 0}
    folder = RunFolder(tmp_path / "run")
    folder.check_restart(config, 2)  # there is nothing yet
    claim(folder)
    folder.write_config(config)
    folder.check_restart(config, 2)
    with pytest.raises(FileExistsError, match="seed: 0 there, 1 now"):
        folder.check_restart(config | {"seed": 1}, 2)
    elsewhere = config["run"] | {"checkpoint_dir": "gs://typo"}
    with pytest.raises(FileExistsError, match="checkpoint_dir"):
        folder.check_restart(config | {"run": elsewhere}, 2)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    folder.metrics.write_text("".join(lines[:4]) + '{"st')  # cut short by a crash
    folder.check_restart(config, 2)
    folder.metrics.write_text("".join(lines))
    with pytest.raises(
        FileExistsError, match=r"up to step 5, but .* has no checkpoint"
    ):
        folder.check_restart(config, 2)
