"""Operations, bytes and kernels that are read off a program compiled for GPUs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.compilers import needs_gpu_compiler

from ibq_jax.base.sharding import make_mesh
from ibq_jax.plan import kernels
from ibq_jax.plan.compiled import compile_plan
from ibq_jax.plan.flops import flops_by_bits
from ibq_jax.plan.gpus import gpu_devices
from ibq_jax.plan.hlo import Module
from ibq_jax.plan.kernels import by_kind, read_kernels

# In the form that jax 0.10.2 prints, with less around it: a loop of three rounds, and a gradient of two weights that is
# sent in one array.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=2

%product (a: bf16[64,32], b: bf16[32,16]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %dot.1 = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %converted = f32[64,16]{1,0} convert(%dot.1)
}

%turned (c: bf16[3,3,8,16]) -> bf16[16,3,3,8] {
  %c = bf16[3,3,8,16]{3,2,1,0} parameter(0)
  ROOT %transpose.1 = bf16[16,3,3,8]{3,2,1,0} transpose(%c), dimensions={3,0,1,2}
}

%row (d: f32[5,64,16], e: s32[]) -> f32[1,64,16] {
  %d = f32[5,64,16]{2,1,0} parameter(0)
  %e = s32[] parameter(1)
  %four = s32[] constant(4)
  %place = s32[] subtract(%four, %e)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,64,16]{2,1,0} dynamic-slice(%d, %place, %zero, %zero), dynamic_slice_sizes={1,64,16}
}

%half (f: f32[2048]) -> f32[1024] {
  %f = f32[2048]{0} parameter(0)
  ROOT %slice.2 = f32[1024]{0} slice(%f), slice={[0:1024]}
}

%narrow (g: f32[1024]) -> bf16[1024] {
  %g = f32[1024]{0} parameter(0)
  ROOT %convert.2 = bf16[1024]{0} convert(%g)
}

%less (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %limit = s32[] constant(3)
  ROOT %compare.1 = pred[] compare(%i, %limit), direction=LT
}

%condition (state.1: (s32[], f32[5,64,16])) -> pred[] {
  %state.1 = (s32[], f32[5,64,16]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  ROOT %goes_on = pred[] fusion(%j), kind=kLoop, calls=%less
}

%body (state: (s32[], f32[5,64,16])) -> (s32[], f32[5,64,16]) {
  %state = (s32[], f32[5,64,16]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %rows = f32[5,64,16]{2,1,0} get-tuple-element(%state), index=1
  %taken = f32[1,64,16]{2,1,0} fusion(%rows, %n), kind=kCustom, calls=%row, backend_config={"fusion_backend_config":{"kind":"__custom_fusion"}}
  %flat = f32[64,16]{1,0} bitcast(%taken)
  %gemm = (f32[64,64]{1,0}, s8[33554432]{0}) custom-call(%flat, %flat), operand_precision={highest,highest}, custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %next = (s32[], f32[5,64,16]{2,1,0}) tuple(%n, %rows)
}

ENTRY %main (x: bf16[2,8,8,8], w: bf16[3,3,8,16], y: bf16[64,32], z: bf16[32,16], s: f32[5,64,16], t: f32[2048]) -> f32[2048] {
  %x = bf16[2,8,8,8]{3,2,1,0} parameter(0)
  %w = bf16[3,3,8,16]{3,2,1,0} parameter(1)
  %y = bf16[64,32]{1,0} parameter(2)
  %z = bf16[32,16]{1,0} parameter(3)
  %s = f32[5,64,16]{2,1,0} parameter(4)
  %t = f32[2048]{0} parameter(5)
  %kernel = bf16[16,3,3,8]{3,2,1,0} fusion(%w), kind=kInput, calls=%turned
  %forward = (bf16[2,8,8,16]{3,2,1,0}, u8[1000]{0}) custom-call(%x, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/Net/conv"}
  %image = bf16[2,8,8,16]{3,2,1,0} get-tuple-element(%forward), index=0
  %to_input = (bf16[2,8,8,8]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %to_kernel = (bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %image), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %tiles = f32[64,16]{1,0} fusion(%y, %z), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %begin = s32[] constant(0)
  %started = (s32[], f32[5,64,16]{2,1,0}) tuple(%begin, %s)
  %loop = (s32[], f32[5,64,16]{2,1,0}) while(%started), condition=%condition, body=%body
  %sum-start = f32[2048]{0} all-reduce-start(%t), replica_groups={{0,1}}, to_apply=%add
  %sum = f32[2048]{0} all-reduce-done(%sum-start)
  %first = f32[1024]{0} fusion(%sum), kind=kLoop, calls=%half
  %shorter = bf16[1024]{0} fusion(%first), kind=kLoop, calls=%narrow
  ROOT %out = f32[2048]{0} copy(%sum)
}
"""  # noqa: E501
# Of the windows of 3 x 3 on 8 x 8 pixels, 22 x 22 positions fall on pixels. Two images, 8 to 16 channels.
CONVOLUTION = 2 * 2 * 22 * 22 * 8 * 16
# The attention of 16 images, 256 positions and 4 heads of 64 channels, and its gradient, on one of 8 H100.
ATTENTION = """HloModule jit_attention, is_scheduled=true

ENTRY %main (q: bf16[2,256,4,64], k: bf16[2,256,4,64], v: bf16[2,256,4,64]) -> bf16[2,4,256,64] {
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(0)
  %k = bf16[2,256,4,64]{3,2,1,0} parameter(1)
  %v = bf16[2,256,4,64]{3,2,1,0} parameter(2)
  %forward = (bf16[2,4,256,64]{3,1,2,0}, f32[2,4,256]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "256", "256"], "tuple_shapes": []}, "mask_type": "CAUSAL"}}
  %o = bf16[2,4,256,64]{3,1,2,0} get-tuple-element(%forward), index=0
  %sums = f32[2,4,256]{2,1,0} get-tuple-element(%forward), index=1
  %backward = (bf16[2,4,256,64]{3,1,2,0}, bf16[2,4,256,64]{3,1,2,0}, bf16[2,4,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v, %sums, %o, /*index=5*/%o), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "256", "256"]}}}
  ROOT %dq = bf16[2,4,256,64]{3,1,2,0} get-tuple-element(%backward), index=0
}
"""  # noqa: E501


def test_operations_of_library_calls_and_triton_kernels():
    flops = flops_by_bits(Module(PROGRAM), "gpu")
    assert flops == {8: 3 * CONVOLUTION + 2 * 64 * 32 * 16, 24: 3 * 2 * 64 * 16 * 64}


def test_cudnns_attention_counts_two_products_and_its_gradient_five():
    module = Module(ATTENTION)
    assert flops_by_bits(module, "gpu") == {8: (2 + 5) * 2 * 2 * 4 * 256 * 256 * 64}
    heads, sums = 2 * 2 * 256 * 4 * 64, 4 * 2 * 4 * 256  # bytes of one array of all heads, bytes of the logsumexp
    assert by_kind(read_kernels(module)) == {kernels.ATTENTIONS: (2, 4 * heads + sums + 7 * heads + sums)}


def test_kernels_count_as_often_as_they_run_with_the_bytes_that_they_move():
    module = Module(PROGRAM)
    found = by_kind(read_kernels(module))
    images, kernel = 2 * 2 * 64 * (8 + 16), 2 * 9 * 8 * 16  # bytes of input and result, bytes of the kernel
    assert found == {
        kernels.CONVOLUTIONS: (3, 3 * (images + kernel)),  # without scratch memory
        kernels.CUBLAS_PRODUCTS: (3, 3 * 4 * (64 * 16 + 64 * 64)),  # both operands are one array
        kernels.TRITON_PRODUCTS: (1, 2 * (64 * 32 + 32 * 16) + 4 * 64 * 16),
        kernels.TRANSPOSES: (1, 2 * kernel),
        kernels.COPIES: (3 + 2, 3 * (4 + 2 * 4 * 64 * 16) + 2 * 4 * 1024 + 2 * 4 * 2048),  # a row each; half the sum
        kernels.CASTS: (1, (4 + 2) * 1024),
        kernels.COLLECTIVE: (1, 2 * 4 * 2048),
    }
    assert sum(size for _, size in found.values()) == sum(module.hbm_traffic().values())
    assert {kernel.place for kernel in read_kernels(module) if kernel.kind == kernels.CONVOLUTIONS} >= {"Net/conv"}


def on_gpus(function, *arguments, nodes=1, gpus=1, mesh=None, specs=None):
    """Compiles for H100 and returns the plan."""
    gpu, devices = gpu_devices(f"h100:{nodes}x{gpus}")
    mesh = make_mesh(mesh or {"data": -1}, devices)
    specs = specs or [P()] * len(arguments)
    placed = [
        jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=NamedSharding(mesh, spec))
        for argument, spec in zip(arguments, specs, strict=True)
    ]
    return compile_plan(jax.jit(function, out_shardings=NamedSharding(mesh, P())), tuple(placed), mesh, gpu)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@needs_gpu_compiler
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_convolution_and_its_gradients_count_as_xla_counts_them(strides):
    x, w = array(4, 33, 31, 64), array(3, 3, 64, 128)

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.square(convolve(x, w).astype(jnp.float32)).sum(), argnums=(0, 1))(x, w)

    plan = on_gpus(gradients, x, w)
    forward = jax.jit(convolve).lower(x, w).cost_analysis()["flops"]
    assert plan.flops_by_bits == {8: pytest.approx(3 * forward, rel=1e-6)}
    assert by_kind(plan.kernels)[kernels.CONVOLUTIONS][0] == 3


@needs_gpu_compiler
def test_products_count_by_precision_and_as_often_as_their_loop_runs():
    def run(x, weights, y):
        looped = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
        return looped, jnp.matmul(y, y, precision="highest"), jnp.matmul(y, y, precision="default")

    plan = on_gpus(run, array(256, 512), array(7, 512, 512), array(1024, 1024, dtype=jnp.float32))
    assert plan.flops_by_bits == {8: 7 * 2 * 256 * 512**2, 24: 2 * 1024**3, 11: 2 * 1024**3}
    seconds = {unit: plan.bounds[unit] for unit in ("tensor cores", "float32 units")}
    assert seconds["tensor cores"] == pytest.approx((7 * 2 * 256 * 512**2 + 2 * 2 * 1024**3) / 989e12)
    assert seconds["float32 units"] == pytest.approx(2 * 1024**3 / 66.9e12, rel=0.001)


@needs_gpu_compiler
def test_elementwise_work_moves_each_array_once():
    plan = on_gpus(lambda x, y: jnp.sin(x) + y, *[array(1000, 4096, dtype=jnp.float32)] * 2)
    assert by_kind(plan.kernels) == {kernels.ELEMENTWISE: (1, 3 * 4 * 1000 * 4096)}
    assert plan.hbm_bytes == 3 * 4 * 1000 * 4096
    assert plan.bounds["HBM"] == plan.hbm_bytes / 3352.32e9
    assert plan.memory.arguments == 2 * 4 * 1000 * 4096


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("axis", "links", "network"),
    [
        ("codebook", 3 / 4, 0),  # four GPUs of one node: each passes on its neighbour's quarter, three times
        ("data", 0, 1 / 2),  # two GPUs, each in a node of its own
        (("data", "codebook"), 7 / 8 * 3 / 4, 7 / 8 / 4),  # four rings, each of which leaves a node at another GPU
    ],
)
def test_a_collective_that_spans_nodes_goes_through_the_network(axis, links, network):
    x, sizes = array(4096, 256, dtype=jnp.float32), {"data": 2, "codebook": 4}
    plan = on_gpus(jnp.sin, x, nodes=2, gpus=4, mesh=sizes, specs=[P(axis)])
    (row,) = plan.collectives
    assert row.kind == "all-gather" and row.axes == (axis if isinstance(axis, str) else ", ".join(axis))
    assert row.bytes == 4 * 4096 * 256
    assert (row.link_bytes, row.network_bytes) == (row.bytes * links, row.bytes * network)
    assert plan.bounds["NVLink"] == row.link_bytes / 450e9 and plan.bounds["network"] == row.network_bytes / 50e9


@needs_gpu_compiler
def test_products_for_which_xla_finds_no_tiles_are_compiled_for_cublas():
    def resize(x):
        return jax.image.resize(x, (4, 224, 224, 3), "bilinear", precision="highest")

    plan = on_gpus(resize, array(4, 256, 256, 3, dtype=jnp.float32))
    assert by_kind(plan.kernels)[kernels.CUBLAS_PRODUCTS][0] == 2
    assert plan.flops_by_bits == {24: 2 * 4 * 3 * 224 * 256 * (256 + 224)}
