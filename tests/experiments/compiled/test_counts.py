"""Collectives, loops and products are counted as the devices do them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.compiled.counts import Counts, count

DEVICES = 8


@functools.cache
def line_of_devices():
    return jax.make_mesh((DEVICES,), ("x",))


def counts_of(fn, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(jax.jit(fn).lower(*args).compile().as_text())


def on_each_device(fn, spec, *shapes):
    """Counts of a function of one device's shards; shapes are the whole arrays'."""
    mesh = line_of_devices()
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape in shapes
    ]
    return count(jax.jit(mapped).lower(*args).compile().as_text())


# ----------------------------------------------------------------------- collectives

ROWS = (DEVICES * 8, 16)  # a device holds (8, 16) float32, 512 bytes
SHARD = 8 * 16 * 4


@pytest.mark.parametrize(
    ("kind", "fn", "sent"),
    [
        ("all-reduce", lambda x: lax.psum(x, "x"), 2 * SHARD * 7 / 8),
        ("all-gather", lambda x: lax.all_gather(x, "x").sum(0), SHARD * 7),
        (
            "reduce-scatter",
            lambda x: jnp.tile(lax.psum_scatter(x, "x", tiled=True), (8, 1)),
            SHARD * 7 / 8,
        ),
        (
            "all-to-all",
            lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True),
            SHARD * 7 / 8,
        ),
        (
            "collective-permute",
            lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            SHARD,
        ),
    ],
)
def test_a_collective_sends_what_a_ring_does(kind, fn, sent):
    spec = P("x", None)
    if kind == "all-reduce":  # its result is the same everywhere
        counts = on_each_device(lambda x: x + fn(x), spec, ROWS)
    else:
        counts = on_each_device(fn, spec, ROWS)
    assert counts.sent == {kind: sent}


def test_what_the_partitioner_adds_is_counted():
    mesh = line_of_devices()
    left = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    right = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16)
    product = jax.jit(
        lambda a, b: (a @ b.astype(jnp.float32)).sum(),
        in_shardings=(NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P("x"))),
    )
    counts = count(product.lower(left, right).compile().as_text())
    assert counts.flops == 2 * 4 * (64 / DEVICES) * 16
    # Summed over devices before or after the last sum: a matrix or one number.
    assert counts.sent["all-reduce"] in (2 * 4 * 16 * 4 * 7 / 8, 2 * 4 * 7 / 8)


def test_groups_smaller_than_the_mesh_send_less():
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    spec = P(("a", "b"), None)
    mapped = jax.shard_map(
        lambda x: x + lax.psum(x, "b"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.ShapeDtypeStruct(ROWS, jnp.float32, sharding=NamedSharding(mesh, spec))
    counts = count(jax.jit(mapped).lower(x).compile().as_text())
    assert counts.sent == {"all-reduce": 2 * SHARD * 3 / 4}


# ----------------------------------------------------------------------------- loops


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x):
        return lax.scan(lambda c, _: (c + lax.psum(c, "x"), None), x, length=5)[0]

    counts = on_each_device(loop, P("x", None), ROWS)
    assert counts.sent == {"all-reduce": 5 * 2 * SHARD * 7 / 8}
    assert counts.unknown_loops == 0


def test_a_loop_in_a_loop_multiplies():
    def inner(c, _):
        return jnp.tanh(c @ c), None

    def outer(c, _):
        return lax.scan(inner, c, length=3)[0], None

    counts = counts_of(lambda x: lax.scan(outer, x, length=5)[0], (16, 16))
    assert counts == Counts(flops=15 * 2 * 16**3)


def test_a_loop_that_does_not_say_how_often_is_reported_and_counted_once():
    def loop(x, n):
        n = n.astype(jnp.int32)
        return lax.fori_loop(0, n, lambda _, c: jnp.tanh(c @ c), x)

    counts = counts_of(loop, (16, 16), ())
    assert counts == Counts(flops=2 * 16**3, unknown_loops=1)


def test_a_loop_whose_flag_its_body_lowers_has_one_turn():
    def loop(x, go, again):
        def turn(carry):
            return again(carry[0]), jnp.tanh(carry[1] @ carry[1])

        return lax.while_loop(lambda carry: carry[0], turn, (go > 0, x))[1]

    once = functools.partial(loop, again=lambda go: jnp.array(False))
    assert counts_of(once, (16, 16), ()) == Counts(flops=2 * 16**3)
    often = functools.partial(loop, again=lambda go: go)
    assert counts_of(often, (16, 16), ()).unknown_loops == 1


def test_of_branches_the_larger_one_counts():
    def branch(x, here):
        return lax.cond(here > 0, lambda: x, lambda: jnp.tanh(x @ x) @ x)

    assert counts_of(branch, (16, 16), ()).flops == 2 * 2 * 16**3


# -------------------------------------------------------------------------- products


def test_batched_products_count_every_batch():
    counts = counts_of(lambda a, b: jnp.matmul(a, b), (3, 8, 5), (3, 5, 7))
    assert counts.flops == 2 * 3 * 8 * 5 * 7


@pytest.mark.parametrize(
    "settings",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 1), "padding": "VALID"},
        {"window_strides": (1, 2), "padding": [(3, 0), (1, 4)]},
        {"window_strides": (1, 1), "padding": [(2, 1), (0, 3)], "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    ],
)
def test_convolutions_count_as_xla_counts_them(settings):
    def convolve(image, kernel):
        return lax.conv_general_dilated(image, kernel, **settings)

    shapes = (2, 6, 9, 11), (4, 6, 3, 2)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    # Lowered, not compiled: CPUs turn convolutions into other things.
    lowered = jax.jit(convolve).lower(*args)
    expected = lowered.cost_analysis()["flops"]
    program = lowered.compiler_ir("hlo").as_hlo_text()
    assert count(program).flops == expected


# ------------------------------------------------------------------- a TPU's program

# From `compile_tpu --model demo --topology v5e:2x2`, shortened: an all-gather split in
# two fusions, a reduce-scatter written as all-reduce and slice, in a loop of 4 rounds;
# the groups are named by mesh axes.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%start.1 (p.1: bf16[1,128,88]) -> (bf16[1,128,88], bf16[1,128,352]) {
  %p.1 = bf16[1,128,88]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.1 = bf16[1,128,352]{1,2,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=82, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={2}, \
frontend_attributes={chain_id="3"}
  ROOT %custom.1 = (bf16[1,128,88]{1,2,0}, /*index=1*/bf16[1,128,352]{1,2,0}) \
custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: bf16[1,128,88]) -> bf16[1,128,352] {
  %p.2 = bf16[1,128,88]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %gather.2 = bf16[1,128,352]{1,2,0:T(8,128)(2,1)} all-gather(%p.2), \
channel_id=82, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, \
dimensions={2}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.9 (p.3: f32[128,128]) -> f32[32,128] {
  %p.3 = f32[128,128]{1,0:T(8,128)} parameter(0)
  %reduce.1 = f32[128,128]{1,0:T(8,128)} all-reduce(%p.3), channel_id=1, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add.1
  %zero.1 = u32[] constant(0)
  ROOT %slice.1 = f32[32,128]{1,0:T(8,128)} dynamic-slice(%reduce.1, %zero.1, %zero.1)
}

%condition.1 (s.1: (s32[], bf16[1,128,88])) -> pred[] {
  %four.1 = s32[]{:T(128)} constant(4), metadata={op_name="while/cond/lt"}
  %s.1 = (s32[]{:T(128)}, bf16[1,128,88]{1,2,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %four.1), direction=LT
}

%body.1 (s.2: (s32[], bf16[1,128,88])) -> (s32[], bf16[1,128,88]) {
  %s.2 = (s32[]{:T(128)}, bf16[1,128,88]{1,2,0}) parameter(0)
  %w.1 = bf16[1,128,88]{1,2,0} get-tuple-element(%s.2), index=1
  %f.1 = (bf16[1,128,88]{1,2,0}, bf16[1,128,352]{1,2,0}) fusion(%w.1), \
kind=kCustom, calls=%start.1
  %f.2 = bf16[1,128,352]{1,2,0} fusion(%w.1), kind=kCustom, \
calls=%async_collective_fusion.1
  %x.1 = f32[16,128,128]{2,1,0} constant({...})
  %k.1 = f32[1,128,352]{2,1,0} constant({...})
  %product.1 = f32[16,128,352]{2,1,0} convolution(%x.1, %k.1), window={size=1}, \
dim_labels=0bf_0io->0bf
  %g.1 = f32[128,128]{1,0} constant({...})
  %f.3 = f32[32,128]{1,0} fusion(%g.1), kind=kCustom, calls=%all-reduce-scatter.9
  ROOT %t.1 = (s32[]{:T(128)}, bf16[1,128,88]{1,2,0}) tuple(%i.9, %w.1)
}

ENTRY %main.1 (a.1: (s32[], bf16[1,128,88])) -> (s32[], bf16[1,128,88]) {
  %a.1 = (s32[]{:T(128)}, bf16[1,128,88]{1,2,0}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[1,128,88]{1,2,0}) while(%a.1), \
condition=%condition.1, body=%body.1
}
"""


def test_a_tpus_own_forms_are_understood():
    assert count(TPU) == Counts(
        sent={
            "all-gather": 4 * 128 * 88 * 2 * 3,  # once, not once for every fusion
            "reduce-scatter": 4 * 128 * 128 * 4 * 3 / 4,
        },
        flops=4 * 2 * 16 * 128 * 128 * 352,
    )


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        count("module @jit_step {\n}\n")
