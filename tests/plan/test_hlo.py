"""Figures read from a compiled program's text, against programs whose figures are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ibq_jax.base.sharding import make_mesh
from ibq_jax.plan.flops import loop_flops
from ibq_jax.plan.hlo import Module

# The form that libtpu prints: tiles of 8 x 128, S(1) for vector memory, the loop's length only in its condition.
TPU_PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[512,512], param_1: bf16[64,512,512], param_2: s32[]) -> f32[512,512] {
  %param_0 = f32[512,512]{1,0:T(8,128)S(1)} parameter(0)
  %param_1 = bf16[64,512,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_1, %param_2, %zero, %zero), dynamic_slice_sizes={1,512,512}
  %row = bf16[512,512]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %product = f32[512,512]{1,0:T(8,128)S(1)} convolution(%param_0, %row), dim_labels=bf_io->bf, metadata={op_name="f/dot"}
}

%body (state: (s32[], f32[512,512], bf16[64,512,512])) -> (s32[], f32[512,512], bf16[64,512,512]) {
  %state = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)S(1)}, bf16[64,512,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %x = f32[512,512]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %w = bf16[64,512,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %y = f32[512,512]{1,0:T(8,128)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%fused, metadata={op_name="f/dot"}
  ROOT %next = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)S(1)}, bf16[64,512,512]{2,1,0:T(8,128)(2,1)}) tuple(%i, %y, %w)
}

%condition (state.1: (s32[], f32[512,512], bf16[64,512,512])) -> pred[] {
  %limit = s32[]{:T(128)} constant(64)
  %state.1 = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)S(1)}, bf16[64,512,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[512,512], w.1: bf16[64,512,512]) -> f32[512,512] {
  %x.1 = f32[512,512]{1,0:T(8,128)} parameter(0)
  %w.1 = bf16[64,512,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %start = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.1)
  %here = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%start)
  %begin = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)S(1)}, bf16[64,512,512]{2,1,0:T(8,128)(2,1)}) tuple(%zero.1, %here, %w.1)
  %loop = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)S(1)}, bf16[64,512,512]{2,1,0:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  %last = f32[512,512]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %padded = f32[4,100,3]{2,1,0:T(8,128)} broadcast(%zero.1), dimensions={}
  ROOT %out = f32[512,512]{1,0:T(8,128)} copy(%last)
}
"""  # noqa: E501


def test_a_tpu_program_counts_main_memory_and_loops():
    module = Module(TPU_PROGRAM)
    traffic = module.hbm_traffic()
    assert traffic["copy-start"] == 4 * 512 * 512  # read; its copy lies in vector memory
    assert traffic["f/dot"] == 64 * 2 * 512 * 512  # one slice of the weights each time; x and y stay in vector memory
    assert traffic["copy"] == 4 * 512 * 512
    assert traffic["broadcast"] == 4 * (4 * 104 * 128) + 4  # tiles pad 100 x 3 to 104 x 128; and the scalar
    assert loop_flops(module) == 63 * 2 * 512**3


@pytest.mark.parametrize("steps", [1, 2, 24])
def test_a_loop_counts_as_often_as_it_runs(steps):
    def run(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((steps, 64, 64), jnp.float32)
    compiled = jax.jit(run).lower(*shapes).compile()
    module = Module(compiled.as_text())
    flops = compiled.cost_analysis()["flops"] + loop_flops(module)
    assert flops == pytest.approx(steps * 2 * 64**3, rel=0.1)
    traffic = sum(module.hbm_traffic().values())
    assert steps * 4 * 3 * 64**2 <= traffic <= steps * 4 * 10 * 64**2  # at least x, w and y; not all weights each time


@pytest.mark.parametrize(
    ("image", "kernel", "labels", "options"),
    [
        ((2, 9, 7, 4), (3, 3, 4, 8), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
        ((2, 9, 7, 4), (3, 3, 4, 8), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME", "window_strides": (2, 2)}),
        ((2, 9, 7, 4), (3, 3, 4, 8), ("NHWC", "HWIO", "NHWC"), {"padding": [(1, 2), (0, 1)], "lhs_dilation": (3, 1)}),
        ((2, 9, 7, 4), (3, 3, 4, 8), ("NHWC", "HWIO", "NHWC"), {"padding": "VALID", "rhs_dilation": (2, 3)}),
        (  # products of 4 x 3 pairs of matrices, in the form of the compiler for TPUs
            (4, 5, 3, 7),
            (4, 3, 6, 5),
            ("HCWN", "HWOI", "HWNC"),
            {"padding": [(0, 0), (0, 0)], "window_strides": (3, 2), "lhs_dilation": (4, 3)},
        ),
    ],
)
def test_a_convolution_in_a_loop_counts_as_xla_counts_one(image, kernel, labels, options):
    def convolve(x, w):
        return lax.conv_general_dilated(x, w, **({"window_strides": (1, 1), "dimension_numbers": labels} | options))

    x, w, ws = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel, (5, *kernel)))
    one = jax.jit(convolve).lower(x, w).cost_analysis()["flops"]
    looped = jax.jit(lambda x, ws: lax.map(lambda w: convolve(x, w), ws)).lower(x, ws).compile()
    assert loop_flops(Module(looped.as_text())) == pytest.approx(4 * one, rel=1e-6)


def test_collectives_know_their_groups_and_bytes():
    mesh = make_mesh({"data": 2, "codebook": 4})

    def run(x):
        gathered = lax.all_gather(x, "codebook", tiled=True)
        return lax.psum(gathered.sum(axis=0), ("data", "codebook"))

    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(("data", "codebook")), out_specs=P())
    shape = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, P(("data", "codebook"))))
    found = {c.kind: c for c in Module(jax.jit(mapped).lower(shape).compile().as_text()).collectives()}
    assert found["all-gather"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found["all-gather"].bytes == 4 * 32 * 16
    assert found["all-reduce"].groups in ((), (tuple(range(8)),))
    assert found["all-reduce"].bytes == 4 * 16
    assert all(c.times == 1 for c in found.values())


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ()),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=1,'c'=4] {'a','c'}", (tuple(range(8)),)),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_every_way_to_write_replica_groups_is_read(written, groups):
    (collective,) = Module(_gathering(written)).collectives()
    assert collective.groups == groups


def test_replica_groups_of_an_unknown_form_are_not_guessed():
    with pytest.raises(ValueError, match="replica groups"):
        Module(_gathering("of tomorrow")).collectives()


def _gathering(replica_groups: str) -> str:
    return f"""HloModule gathering

ENTRY %main (x: f32[4]) -> f32[8] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %gathered = f32[8]{{0}} all-gather(%x), channel_id=1, replica_groups={replica_groups}, dimensions={{0}}
}}
"""
