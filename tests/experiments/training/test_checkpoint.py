"""Checkpoints: what is kept, other meshes, damage, disks that fail, foreign folders."""

import errno
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from experiments.training import reader
from experiments.training.checkpoint import Checkpointer, ResumeError, SaveError
from experiments.training.mesh import make_mesh
from experiments.training.preservation import LowestObjective
from experiments.training.reader import Reader
from experiments.training.state import TrainState, shardings_of
from experiments.training.step import make_train_step
from tests.experiments.training.small_run import (
    CONFIG,
    OPTIMIZER,
    Numbers,
    as_batch,
    checkpointer,
    initial_state,
    loss_fn,
    rows,
    run,
    steps_saved,
)


def restore(folder: Path, **options) -> tuple[TrainState, Numbers]:
    batches = Numbers()
    with checkpointer(folder, **options) as saved:
        return saved.restore(initial_state(), batches), batches


def data_files(step: Path) -> list[Path]:
    """The files that hold the arrays."""
    return [path for path in (step / "state").rglob("d/*")]


# ---------------------------------------------------------------------- what is kept


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A second try of a read comes without a wait."""
    monkeypatch.setattr(reader, "_WAIT", 0.0)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, steps=7, every=2, keep=2)
    assert steps_saved(tmp_path) == [6, 7]


def test_the_best_checkpoint_is_kept_besides_also_over_a_resume(tmp_path):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}
    run(tmp_path, steps=8, every=2, keep=2, losses=losses)
    assert steps_saved(tmp_path) == [4, 6, 8]
    run(tmp_path, steps=12, every=2, keep=2, losses={10: 5.0, 12: 0.5}, resume=True)
    assert steps_saved(tmp_path) == [10, 12]


def test_the_best_checkpoint_is_found_again(tmp_path):
    losses = {2: 3.0, 4: 1.0, 6: math.nan, 8: 2.0}
    run(tmp_path, steps=8, every=2, keep=8, losses=losses)
    with checkpointer(tmp_path) as saved:
        best = saved.best(initial_state())
    assert int(best.step) == 4
    np.testing.assert_array_equal(
        best.params["w"], run(tmp_path / "short", steps=4).state.params["w"]
    )
    run(tmp_path / "unranked", steps=2)
    with (
        checkpointer(tmp_path / "unranked") as saved,
        pytest.raises(ResumeError, match=r"no checkpoint .* evaluated can be read"),
    ):
        saved.best(initial_state())


def test_of_equal_ones_the_first_is_the_best():
    lowest = LowestObjective()
    for step in (78, 156, 234):  # which a set of them does not keep in order
        lowest.add(step, -0.5)
    assert lowest.best({78, 156, 234}) == 78


def test_a_state_that_is_restored_takes_the_place_of_the_one_before(tmp_path):
    run(tmp_path, steps=2, every=2, losses={2: 1.0})
    with checkpointer(tmp_path) as saved:
        for restore in (
            lambda state: saved.start(state, Numbers(), resume=True),
            saved.best,
        ):
            before = initial_state()
            assert int(restore(before).step) == 2
            assert all(array.is_deleted() for array in jax.tree.leaves(before))


def test_the_next_best_takes_the_place_of_a_damaged_best_one(tmp_path):
    run(tmp_path, steps=6, every=2, keep=8, losses={2: 3.0, 4: 1.0, 6: 2.0})
    said = []
    for damaged, best in ((4, 6), (6, 2)):
        truncate(tmp_path / "checkpoints" / str(damaged))
        with checkpointer(tmp_path, report=said.append) as saved:
            assert int(saved.best(initial_state()).step) == best
        assert f"{damaged}, the best checkpoint, cannot be read" in said[-1]
    truncate(tmp_path / "checkpoints" / "2")
    with (
        checkpointer(tmp_path) as saved,
        pytest.raises(ResumeError, match=r"no checkpoint .* evaluated can be read"),
    ):
        saved.best(initial_state())


def test_a_checkpoint_holds_the_state_as_it_was_when_saved(tmp_path):
    # Saving is asynchronous and the step gives its buffers up: neither may show.
    state = run(tmp_path / "short", steps=2).state
    run(tmp_path / "long", steps=6, every=2, keep=3)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "long" / "checkpoints" / str(step))
    restored, batches = restore(tmp_path / "long")
    assert isinstance(restored, TrainState)
    chex.assert_trees_all_equal(restored, state)
    assert batches.number == 102


def test_the_config_is_in_every_checkpoint(tmp_path):
    run(tmp_path, steps=2)
    record = json.loads(
        (tmp_path / "checkpoints" / "2" / "record" / "metadata").read_text()
    )
    assert record["content"]["config"] == CONFIG
    assert record["content"]["positions"] == [{"number": 102}]


# ---------------------------------------------------------------------- whose it is


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ResumeError, match="no checkpoint"):
        run(tmp_path, resume=True)


def test_auto_resume_starts_and_goes_on(tmp_path):
    straight = run(tmp_path / "straight")
    run(tmp_path / "auto", steps=3, auto_resume=True)
    again = run(tmp_path / "auto", auto_resume=True)
    chex.assert_trees_all_equal(again.state, straight.state)


def test_a_fresh_start_among_checkpoints_is_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(FileExistsError, match=r"holds checkpoints of a run: --resume"):
        run(tmp_path, steps=2)
    assert steps_saved(tmp_path) == [2]


@pytest.mark.parametrize("how", ["resume", "auto_resume"])
def test_another_run_is_refused_with_what_differs_and_left_alone(tmp_path, how):
    run(tmp_path, steps=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ResumeError, match=r"model\.size: 8 there, 9 now"):
        run(tmp_path, identity={"model": {"size": 9}}, **{how: True})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_state_of_another_form_is_refused_and_nothing_is_called_damaged(tmp_path):
    run(tmp_path, steps=2)
    other = initial_state()._replace(params={"w": jnp.zeros((8, 9))})
    with checkpointer(tmp_path) as saved:
        with pytest.raises(ResumeError, match="other parameters"):
            saved.restore(other, Numbers())
    assert steps_saved(tmp_path) == [2]


def test_a_buckets_name_stays_a_buckets(monkeypatch):
    # No bucket here: what Orbax is handed is all that can be seen.
    opened = []

    class Manager:
        def __init__(self, directory, options):
            opened.append(directory)

        def all_steps(self):
            return []

    monkeypatch.setattr(ocp, "CheckpointManager", Manager)
    Checkpointer("gs://bucket/run", keep=1, identity={}, config={}, report=print)
    assert opened == [epath.Path("gs://bucket/run")]
    assert str(opened[0]) == "gs://bucket/run"


# --------------------------------------------------------------------------- damage


def truncate(step: Path) -> None:
    for path in data_files(step):
        path.write_bytes(path.read_bytes()[:-20])


def delete_data(step: Path) -> None:
    for path in data_files(step):
        path.unlink()


def delete_record(step: Path) -> None:
    (step / "record" / "metadata").unlink()


def change_position(step: Path) -> None:
    path = step / "record" / "metadata"
    path.write_text(path.read_text().replace('"number": 106', '"number": 107'))


def change_identity(step: Path) -> None:
    path = step / "record" / "metadata"
    path.write_text(path.read_text().replace('"size": 8', '"size": 9'))


def cut_record(step: Path) -> None:
    path = step / "record" / "metadata"
    path.write_bytes(path.read_bytes()[:-30] + b"\xff")


DAMAGES = [
    truncate,
    delete_data,
    delete_record,
    change_position,
    change_identity,
    cut_record,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, damage):
    straight = run(tmp_path, every=2)
    expected = rows(tmp_path)
    assert steps_saved(tmp_path) == [4, 6]
    damage(tmp_path / "checkpoints" / "6")
    lines = []
    again = run(tmp_path, every=2, resume=True, report=lines.append)
    (line,) = lines
    assert f"{tmp_path}/checkpoints/6 cannot be used" in line
    assert "now damaged-6" in line
    assert (tmp_path / "checkpoints" / "damaged-6").is_dir()
    # It was gone on from step 4, and 6 was saved anew.
    chex.assert_trees_all_equal(again.state, straight.state)
    assert rows(tmp_path) == expected
    assert steps_saved(tmp_path) == [4, 6]
    assert int(restore(tmp_path)[0].step) == 6


def test_a_flipped_bit_is_noticed_or_means_nothing(tmp_path):
    run(tmp_path / "good", steps=2)
    good = restore(tmp_path / "good")[0]
    (name,) = (tmp_path / "good" / "checkpoints" / "2" / "state" / "d").iterdir()
    data = name.read_bytes()
    noticed = 0
    for place in np.linspace(0, len(data) - 1, 5, dtype=int):
        copy = tmp_path / str(place)
        shutil.copytree(tmp_path / "good", copy)
        flipped = bytearray(data)
        flipped[place] ^= 4
        (copy / name.relative_to(tmp_path / "good")).write_bytes(flipped)
        try:
            chex.assert_trees_all_equal(restore(copy)[0], good)
        except ResumeError:
            noticed += 1
    assert noticed >= 4


def test_arrays_that_are_not_those_saved_are_noticed(tmp_path):
    # Readable files throughout: only the fingerprint can tell.
    run(tmp_path, every=2)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "6" / "state")
    shutil.copytree(folder / "4" / "state", folder / "6" / "state")
    lines = []
    with checkpointer(tmp_path, report=lines.append) as saved:
        assert int(saved.restore(initial_state(), Numbers()).step) == 4
    assert "not those that were saved" in lines[0]


@pytest.mark.parametrize("reason", ["UNAVAILABLE: bucket", "RESOURCE_EXHAUSTED: HBM"])
def test_storage_that_is_away_does_not_condemn_a_checkpoint(
    tmp_path, monkeypatch, reason
):
    run(tmp_path, every=2)

    def away(self, step, **items):
        raise ValueError(reason)

    monkeypatch.setattr("experiments.training.reader.Reader._read", away)
    with (
        pytest.raises(OSError, match="Nothing was changed"),
        checkpointer(tmp_path) as saved,
    ):
        saved.restore(initial_state(), Numbers())
    assert steps_saved(tmp_path) == [4, 6]


def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    run(tmp_path, every=2)
    read, failures = Reader._read, iter([True, False, True])

    def shaky(self, step, **items):
        if next(failures, False):
            raise OSError("reset by peer")
        return read(self, step, **items)

    monkeypatch.setattr("experiments.training.reader.Reader._read", shaky)
    state, _ = restore(tmp_path)
    assert int(state.step) == 6 and steps_saved(tmp_path) == [4, 6]


def test_without_a_good_checkpoint_all_are_named_and_none_is_touched(tmp_path):
    run(tmp_path, every=2)
    for step in (4, 6):
        delete_record(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ResumeError, match=r"no checkpoint in .* 6: .*; 4: "):
        run(tmp_path, auto_resume=True)
    assert steps_saved(tmp_path) == [4, 6]


# ----------------------------------------------------------------------- other meshes

SPECS = {
    (8, "a"): ((1, 8), P(None, "fsdp")),
    (8, "b"): ((2, 4), P("data", "fsdp")),
    (4, "a"): ((1, 4), P(None, "fsdp")),
}


@functools.cache
def on_mesh(key):
    """A state and a step on some devices; the matrix is split along one axis or two."""
    state = initial_state()
    if key is None:
        shardings = jax.tree.map(
            lambda _: SingleDeviceSharding(jax.devices()[0]), state
        )
    else:
        sizes, spec = SPECS[key]
        mesh = make_mesh(*sizes, explicit=False)
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, spec if x.shape == (8, 8) else P()), state
        )
    state = jax.device_put(state, shardings)
    step = make_train_step(
        loss_fn,
        OPTIMIZER,
        optax.constant_schedule(1e-2),
        shardings=shardings_of(state),
    )
    return state, step


def continued(state: TrainState, step) -> list[float]:
    losses = []
    for number in range(5):
        state, metrics = step(state, as_batch(number))
        losses.append(float(metrics["loss"]))
    return losses


def test_a_run_goes_on_on_other_devices(tmp_path):
    trained = run(tmp_path / "origin", steps=3).state
    expected = None
    layouts = [(8, "a"), (4, "a"), None, (8, "b"), (8, "a")]
    for number, key in enumerate(layouts):
        # Each layout saves what the one before has restored: 8 -> 4 -> 1 -> 8.
        source = tmp_path / ("origin" if number == 0 else f"hop{number - 1}")
        state, step = on_mesh(key)
        with checkpointer(source) as saved:
            restored = saved.restore(state, Numbers())
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, state)
        assert jax.tree.all(same)
        chex.assert_trees_all_equal(restored, trained)
        with checkpointer(tmp_path / f"hop{number}") as saved:
            saved.save(3, restored, {"number": 103})
        if key == (8, "b"):  # compiling takes long
            continue
        losses = continued(restored, step)
        expected = losses if expected is None else expected
        # The last layout is the first: there the run goes on bit for bit.
        rtol = 0 if number == len(layouts) - 1 else 1e-5
        np.testing.assert_allclose(losses, expected, rtol=rtol)


# -------------------------------------------------------------------- disks that fail


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.experiments.training.small_run import run

# Files of Orbax are larger than this, the rows of metrics are not.
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    run(Path(sys.argv[1]), steps=4, resume=True)
except OSError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_while_saving_leaves_the_checkpoints_before(tmp_path):
    run(tmp_path, steps=2)
    before = restore(tmp_path)[0]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.startswith("SaveError: could not save"), done
    assert "File too large" in done.stdout
    assert "make room, then go on with --resume" in done.stdout
    assert done.stdout.count("\n") == 1
    assert steps_saved(tmp_path) == [2]
    chex.assert_trees_all_equal(restore(tmp_path)[0], before)
    assert int(run(tmp_path, steps=4, resume=True).state.step) == 4


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="another --checkpoint-dir") as caught:
        checkpointer(tmp_path / "file")
    assert caught.value.errno == errno.ENOTDIR


def test_an_error_of_the_run_is_not_replaced_by_one_of_the_last_save(
    tmp_path, monkeypatch
):
    lines = []

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyError, match="the run's"):
        with checkpointer(tmp_path, report=lines.append) as saved:
            monkeypatch.setattr("os.rename", full)
            saved.save(1, initial_state(), {"number": 101})
            raise KeyError("the run's")
    assert "No space left" in lines[0]
    assert issubclass(SaveError, OSError)
