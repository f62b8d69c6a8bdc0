"""Which leaves a Tucker projection takes, and which of their axes are modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngalore_jax.tensors import TensorView, default_mode_axes, tensor_views

PARAMS = {
    "bias": jax.ShapeDtypeStruct((5,), "float32"),
    "conv": jax.ShapeDtypeStruct((3, 3, 4, 5), "float32"),
    "dense": jax.ShapeDtypeStruct((4, 5), "float32"),
    "embed": jax.ShapeDtypeStruct((9, 4), "float32"),
    "stack": jax.ShapeDtypeStruct((2, 4, 5), "float32"),
}


def test_default_axes():
    assert default_mode_axes(PARAMS) == {
        "bias": None,
        "conv": (0, 1, 2, 3),
        "dense": (-2, -1),
        "embed": None,
        "stack": (-2, -1),
    }


def test_ranks_are_clipped_to_the_modes():
    views = dict(zip(PARAMS, tensor_views(PARAMS, None, 4)))
    assert views["conv"] == TensorView((3, 3, 4, 5), (), (0, 1, 2, 3), (3, 3, 4, 4))
    assert views["stack"] == TensorView((2, 4, 5), (0,), (1, 2), (4, 4))
    assert views["bias"] is None and views["embed"] is None


@pytest.mark.parametrize("as_function", [False, True])
def test_axes_given(as_function):
    tree = dict.fromkeys(PARAMS) | {"stack": (0, 2), "conv": [3, 2]}
    views = tensor_views(PARAMS, (lambda _: tree) if as_function else tree, 4)
    assert [v is None for v in views] == [True, False, True, True, False]
    assert views[-1] == TensorView((2, 4, 5), (1,), (0, 2), (2, 4))
    assert views[1].sides == (5, 4) and views[1].batch_shape == (3, 3)


def test_tensors_and_back():
    leaf = jnp.arange(2 * 4 * 5).reshape(2, 4, 5)
    view = TensorView((2, 4, 5), (1,), (2, 0), (1, 1))
    tensor = view.to_tensor(leaf)
    np.testing.assert_array_equal(tensor[3], leaf[:, 3, :].T)
    np.testing.assert_array_equal(view.from_tensor(tensor), leaf)


@pytest.mark.parametrize(
    ("axes", "message"),
    [((0, 3), "gives .0, 3. to a leaf"), ((1, -2), "different"), ((1,), "two or more")],
)
def test_axes_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        tensor_views({"w": PARAMS["stack"]}, {"w": axes}, 2)


def test_what_are_no_axes():
    with pytest.raises(TypeError, match="tuple of axes or None for each leaf, got -1"):
        tensor_views({"w": PARAMS["stack"]}, {"w": -1}, 2)
