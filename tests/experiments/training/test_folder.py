"""Who may write into a run's folder."""

import pytest

from experiments.training.folder import RunFolder


def make_run(path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(resume=False, overwrite=False)
    folder.write_config({"steps": 3})
    folder.metrics.write_text("")
    folder.tokenizer.write_text("")
    (folder.checkpoints / "3").mkdir(parents=True)
    return folder


def test_a_new_folder_is_made(tmp_path):
    make_run(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_a_run_is_not_overwritten_unasked(tmp_path):
    folder = make_run(tmp_path)
    with pytest.raises(FileExistsError, match=r"--resume .*--overwrite .*--run-dir"):
        folder.claim(resume=False, overwrite=False)
    assert folder.checkpoints.exists()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    folder = make_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    folder.claim(resume=False, overwrite=True)
    assert folder.metrics.exists()
    folder.delete_run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "tokenizer.json"]


def test_a_folder_without_a_run_is_left_alone_by_overwrite(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    RunFolder(tmp_path).claim(resume=False, overwrite=True)
    RunFolder(tmp_path).delete_run()
    assert (tmp_path / "checkpoints").exists()


def test_resume_needs_a_run_and_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        RunFolder(tmp_path / "none").claim(resume=True, overwrite=False)
    assert not (tmp_path / "none").exists()
    folder = make_run(tmp_path)
    folder.claim(resume=True, overwrite=False)
    assert folder.metrics.exists()
