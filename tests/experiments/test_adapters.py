"""Methods with adapters by name, from the command line to a step and to a report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kill_test
from experiments.assembly import parts_of, step_of
from experiments.presets import parse
from experiments.pretrain import main
from experiments.training.folder import RunFolder
from experiments.training.state import TrainState

TINY = (
    "--sequence-length 16 --batch-size 8 --validation-tokens 200 --rank 4 "
    "--model.vocab-size 300 --model.hidden-size 16 --model.intermediate-size 24 "
    "--model.num-heads 2 --model.num-layers 2"
).split()


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("lora", {"kernel", "lora_a", "lora_b"}),
        ("relora", {"kernel", "lora_a", "lora_b"}),
        ("low_rank", {"lora_a", "lora_b"}),
        ("adamw", {"kernel"}),
    ],
)
def test_a_method_chooses_the_model_s_parameters(name, leaves):
    config = parse([*TINY, "--optimizer", name])
    parts = parts_of(config)

    def init(key: jax.Array) -> TrainState:
        params = parts.init_params(key)
        return TrainState(params, parts.optimizer.init(params), jnp.int32(0))

    state = jax.eval_shape(init, jax.random.key(0))
    assert set(state.params["layers"]["mlp"]["up_proj"]) == leaves
    assert set(state.params["lm_head"]) == {"kernel"}
    batch = {
        "tokens": jax.ShapeDtypeStruct((8, 17), jnp.int32),
        "weights": jax.ShapeDtypeStruct((8, 16), jnp.float32),
    }
    after, _ = jax.eval_shape(step_of(config, parts, None), state, batch)
    assert after == state


def test_relora_trains_by_name_and_its_restart_shows(tmp_path):
    texts, run_dir = tmp_path / "texts", tmp_path / "run"
    kill_test.write_texts(texts)
    paths = ["--data", f"{texts}/*.txt", "--run-dir", str(run_dir)]
    run = "--optimizer relora --steps 24 --relora-gap 20 --eval-every 24".split()
    assert main([*paths, *TINY, *run]) == 0
    rows = kill_test.rows(RunFolder(run_dir))
    assert rows[-1]["validation_loss"] < rows[0]["loss"] - 0.3
    rates = np.asarray([row["learning_rate"] for row in rows])
    assert 2 * rates[20] < rates[19] and 1.5 * rates[20] < rates[21]
    # Two moments of four bytes of what the base model has.
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    megabytes = 8 * (2 * 300 * 16 + 2 * layer + 16) / 1e6
    report = (run_dir / "report.md").read_text()
    assert f"AdamW's would be | {megabytes:.2f} MB" in report


def test_a_rank_above_a_side_costs_no_run(tmp_path, capsys):
    texts = tmp_path / "texts"
    kill_test.write_texts(texts)
    paths = ["--data", f"{texts}/*.txt", "--run-dir", str(tmp_path / "run")]
    assert main([*paths, *TINY, "--optimizer", "low_rank", "--rank", "17"]) == 1
    assert "rank=17 is larger than a side of the 16 x 16" in capsys.readouterr().err
