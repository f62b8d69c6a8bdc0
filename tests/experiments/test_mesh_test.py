"""A real run that goes on on another mesh, by the command that compares many."""

import json

from experiments import mesh_test


def test_on_another_mesh_losses_are_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mesh_test, "_FIRST", (1, 2, 1))
    monkeypatch.setattr(mesh_test, "_TINY", f"{mesh_test._TINY} --optimizer adamw")
    monkeypatch.setattr(mesh_test, "_OTHERS", ((2, 1, 1),))
    path = tmp_path / "results.json"
    assert mesh_test.main(["--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())
    assert row["data x fsdp x tensor"] == "2 x 1 x 1"
    assert row[mesh_test._DIFFERENCE] < 1e-5
    assert "2 x 1 x 1" in capsys.readouterr().out
