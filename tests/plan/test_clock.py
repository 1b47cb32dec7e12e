"""The time that a TPU's compiler expects, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from support.compilers import needs_libtpu

from ibq_jax.base.sharding import make_mesh
from ibq_jax.plan.chips import CHIPS, topology_devices
from ibq_jax.plan.clock import COPIES, OTHERS, PRODUCTS, place, read_clock
from ibq_jax.plan.compiled import compile_plan
from ibq_jax.plan.hlo import Module

# As libtpu prints it: a loop that runs five times, a kernel without an estimate, a collective that is only started.
PROGRAM = """HloModule jit_f, is_scheduled=true

%product (param_0: f32[8,8]) -> f32[8,8] {
  %param_0 = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} convolution(%param_0, %param_0), dim_labels=bf_io->bf
}

%start (param_0.1: f32[8,8]) -> (f32[8,8], f32[8,8]) {
  %param_0.1 = f32[8,8]{1,0} parameter(0)
  %all-gather.1 = f32[8,16]{1,0} all-gather(%param_0.1), replica_groups={{0,1}}, dimensions={1}, metadata={op_name="jit(f)/gather"}
  ROOT %call = (f32[8,8]{1,0}, f32[8,16]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product, metadata={op_name="jit(f)/jvp(Net)/while/body/layer/dot_general"}, backend_config={"estimated_cycles":"3000"}
  %z = f32[8,8]{1,0} add(%y, %y), metadata={op_name="jit(f)/jvp(Net)/while/body/layer/add"}, backend_config={"estimated_cycles":"500"}
  ROOT %next = (s32[], f32[8,8]{1,0}) tuple(%i, %z)
}

%condition (state.1: (s32[], f32[8,8])) -> pred[] {
  %limit = s32[] constant(5)
  %state.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,8]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[8,8]{1,0}) while(%begin), condition=%condition, body=%body
  %last = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[8,8]{1,0} all-reduce(%last), replica_groups={{0,1}}, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %started = (f32[8,8]{1,0}, f32[8,16]{1,0}) fusion(%sum), kind=kCustom, calls=%start
  %kernel = f32[8,8]{1,0} custom-call(%sum), custom_call_target="tpu_custom_call"
  ROOT %out = f32[8,8]{0,1} copy(%kernel), backend_config={"estimated_cycles":"40"}
}
"""  # noqa: E501


def test_cycles_count_as_often_as_their_loop_runs_by_kind():
    chip = CHIPS["v5e"]
    clock = read_clock(Module(PROGRAM), chip)
    assert chip.clock == pytest.approx(1.5e9, rel=0.01)
    assert {kind: round(chip.clock * seconds) for kind, seconds in clock.seconds.items()} == {
        PRODUCTS: 5 * 3000,
        OTHERS: 5 * 500,
        COPIES: 40,
    }
    assert round(chip.clock * clock.total) == 5 * 3500 + 40 and clock.unknown == 1
    first, second, third = clock.operations
    assert (first.place, first.times, first.kind) == ("Net/layer/dot_general", 5, PRODUCTS)
    assert (second.place, second.times) == ("Net/layer/add", 5) and third.place == "copy"
    without = read_clock(Module(PROGRAM), chip, without="dot_general")
    assert round(chip.clock * without.total) == 5 * 500 + 40
    assert round(chip.clock * without.left_out) == 5 * 3000 and clock.left_out == 0


def test_a_program_without_estimates_has_no_clock():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    assert read_clock(Module(compiled.as_text()), CHIPS["v5e"]) is None


def test_a_collective_that_is_started_is_found_and_hidden():
    waited, started = Module(PROGRAM).collectives()
    assert (waited.kind, waited.bytes, waited.hidden) == ("all-reduce", 4 * 64, False)
    assert (started.kind, started.bytes, started.hidden) == ("all-gather", 4 * 128, True)
    assert started.groups == ((0, 1),)


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            "jit(step)/transpose(jvp(Model))/Model.decode/up/conv1/conv_general",
            "Model/up/conv1/conv_general (backward)",
        ),
        ("jit(step)/jvp(Model)/while/body/closed_call/checkpoint/layer/dot", "Model/layer/dot"),
        ("jit(step)/jvp()/sub", "sub"),
        ("", ""),
    ],
)
def test_a_place_is_the_modules_names(op_name, expected):
    assert place(op_name).strip("/") == expected


@needs_libtpu
@pytest.mark.parametrize("chip_name", list(CHIPS))
def test_a_large_product_is_expected_to_run_near_the_peak(chip_name):
    chip, devices = topology_devices(f"{chip_name}:" + "x".join(["2", "2", "1"][: CHIPS[chip_name].dimensions]))
    assert len(devices) == 4 * chip.devices_per_chip
    sharding = SingleDeviceSharding(devices[0])
    size = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=sharding)
    compiled = jax.jit(jnp.matmul, out_shardings=sharding).lower(size, size).compile()
    clock = read_clock(Module(compiled.as_text()), chip)
    assert 0.8 < 2 * 4096**3 / chip.flops / clock.total <= 1
    assert clock.seconds[PRODUCTS] == clock.total


@needs_libtpu
def test_a_collective_beside_a_product_is_hidden_and_one_in_its_way_is_not():
    chip, devices = topology_devices("v5e:2x2")
    mesh = make_mesh({"data": 2, "codebook": 2}, devices)

    def step(x, w):
        gathered = lax.all_gather(jnp.sin(x), "codebook", axis=1, tiled=True)
        other = lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=4)[0]
        return gathered.sum(axis=1), lax.psum(other, "data")

    rows = P("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows, P()), out_specs=(rows, P()), check_vma=False)
    arguments = (
        jax.ShapeDtypeStruct((2048, 1024), jnp.float32, sharding=NamedSharding(mesh, rows)),
        jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P())),
    )
    plan = compile_plan(jax.jit(mapped), arguments, mesh, chip)
    kinds = {traffic.kind: traffic for traffic in plan.collectives}
    assert kinds["all-reduce"].exposed_link_bytes == kinds["all-reduce"].link_bytes > 0
    assert kinds["all-gather"].count == 1
    assert plan.expected_seconds["collectives that nothing hides"] > 0
    assert plan.expected_seconds[PRODUCTS] > 4 * 2 * 1024**3 / chip.flops
