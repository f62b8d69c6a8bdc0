"""Presets that no paper publishes: what their docstrings promise."""

import pytest

from experiments.models.llama_config import PRESETS
from experiments.presets import preset


@pytest.mark.parametrize(("name", "millions"), [("demo", 0.8), ("small", 5.5)])
def test_two_scales_for_two_cores_differ_in_size_alone(name, millions):
    model = PRESETS[name]
    hidden = model.hidden_size
    layer = 4 * hidden**2 + 3 * hidden * model.intermediate_size
    assert model.num_layers * layer / 1e6 == pytest.approx(millions, abs=0.05)

    galore, natural = preset(name, "galore"), preset(name, "natural_galore")
    assert galore.model == natural.model == model
    assert galore.optimization.rank == hidden // 4
    assert natural.optimization.rank == hidden // 16
    assert galore.optimization.update_proj_gap == 10
    assert natural.optimization.update_proj_gap == 3
    assert galore.run.batch_size * galore.text.sequence_length == 2048
    assert galore.run == natural.run
    assert galore.run.steps == 400 == 8 * galore.run.eval_every
