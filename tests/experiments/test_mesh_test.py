"""A real run that goes on on another mesh, as by the command that compares many."""

from experiments import mesh_test


def test_on_another_mesh_losses_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh_test, "_FIRST", (1, 2, 1))
    monkeypatch.setattr(mesh_test, "_TINY", f"{mesh_test._TINY} --optimizer adamw")
    monkeypatch.setattr(mesh_test, "_OTHERS", ((2, 1, 1),))
    (row,) = mesh_test.compare(tmp_path)
    assert row["data x fsdp x tensor"] == "2 x 1 x 1"
    assert row[mesh_test._DIFFERENCE] < 1e-5
