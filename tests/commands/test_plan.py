"""Plans of a training step for devices that are not present; those for TPUs are skipped without libtpu."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.compilers import installed, needs_gpu_compiler, needs_libtpu
from support.small_runs import SMALL_JOINT

from ibq_jax.__main__ import main
from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.commands import plan as plan_command
from ibq_jax.plan.chips import CHIPS, topology_devices
from ibq_jax.plan.compiled import DoesNotFit, compile_plan
from ibq_jax.plan.hlo import Module
from ibq_jax.tokenizer.step import TokenizerTrainer, abstract_arguments, jit_train_step

CONFIG = f"{Path(__file__).parents[2]}/configs/tokenizer.py:openmoji32"
SMALL = [
    f"--config.{field}"
    for field in (
        "data.image_size=16",
        "data.resize=16",
        "data.batch_size=8",
        "model.channel_multipliers=(1,1)",
        "model.num_res_blocks=0",
        "model.z_channels=16",
        "codebook.size=64",
        "codebook.dim=8",
        "discriminator.channels=8",
        "discriminator.num_layers=1",
        "discriminator.norm_group=0",
        "loss.perceptual_weight=0.0",
        "quantizer.entropy_group_tokens=0",
    )
]
# One network of one level, which the compiler for TPUs takes a third of the time for.
ONE_NETWORK = [
    *SMALL,
    *("--config.discriminator.name=none", "--config.model.channel_multipliers=(1,)"),
    *("--config.data.image_size=8", "--config.data.resize=8"),
]


def test_bounds_and_collectives_of_a_known_step():
    mesh = make_mesh({"data": 2, "codebook": 4})
    rows, columns = P("data"), P(None, "codebook")

    def step(x, w):
        return lax.all_gather(x @ w, "codebook", axis=1, tiled=True)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows, columns), out_specs=rows, check_vma=False)
    arguments = (
        jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=NamedSharding(mesh, rows)),
        jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, columns)),
    )
    plan = compile_plan(jax.jit(mapped), arguments, mesh, CHIPS["v5e"])
    assert plan.memory.arguments == 4 * (128 * 512 + 512 * 256)
    assert plan.flops == pytest.approx(2 * 128 * 512 * 256, rel=0.01)
    (gather,) = plan.collectives
    assert (gather.kind, gather.axes, gather.count, gather.bytes) == ("all-gather", "codebook", 1, 4 * 128 * 1024)
    assert gather.link_bytes == gather.bytes * 3 / 4  # each device passes on its neighbour's part, three times
    assert plan.bounds["interconnect"] == gather.link_bytes / CHIPS["v5e"].ici_bytes_per_second
    assert plan.bounds["matrix units"] == plan.flops / 197e12
    assert plan.bounds["HBM"] == plan.hbm_bytes / 819e9
    assert plan.memory.spare(2 * plan.memory.peak) == 0.5


@pytest.mark.slow
def test_the_whole_step_holds_no_array_of_all_codes_on_one_device():
    """Neither [tokens, codes], nor [codes, dimensions] of parameters, gradients, moments or averages."""
    codes, width = 65_536, 32
    sizes = [f"--config.codebook.size={codes}", f"--config.codebook.dim={width}", "--config.codebook.block_size=256"]
    config = load_config(CONFIG, SMALL + sizes)

    def largest(mesh):
        trainer = TokenizerTrainer(config, mesh, steps_per_epoch=1)
        program = jit_train_step(trainer).lower(*abstract_arguments(trainer)).compile().as_text()
        arrays = [array for _, i, _ in Module(program).executed() for array in i.arrays]
        return max(math.prod(array.shape) for array in arrays)

    assert largest(make_mesh({"data": 2, "codebook": 4})) == codes * width // 4
    assert largest(make_mesh({"data": 8})) == codes * width  # the same search, with a codebook that is not split


@pytest.mark.slow
def test_a_plan_on_simulated_devices(capsys):
    assert main(["plan", f"--config={CONFIG}", "--cpu-devices=8", "--mesh=data:2,codebook:4", "--json", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == 8 and report["mesh"] == {"data": 2, "fsdp": 1, "codebook": 4}
    assert 0 < report["argument_bytes"] < report["peak_bytes"] and report["flops"] > 0
    axes = {row["axes"] for row in report["collectives"]}
    assert "codebook" in axes and "data, codebook" in axes


def test_a_plan_of_a_generator(capsys):
    config = CONFIG.replace("tokenizer.py", "autoregressive.py")
    small = [
        f"--config.model.{field}"
        for field in ("num_layers=2", "embed_dim=32", "num_heads=2", "num_kv_heads=2", "grid=(4, 4)")
    ]
    mesh = "--mesh=data:2,fsdp:2,codebook:2"
    assert main(["plan", f"--config={config}", "--cpu-devices=8", mesh, "--json", *small]) == 0
    report = json.loads(capsys.readouterr().out)
    axes = {row["axes"] for row in report["collectives"]}
    assert {"codebook", "fsdp"} <= axes and report["flops"] > 0


@pytest.mark.slow
def test_a_plan_of_a_joint_step(capsys):
    config = CONFIG.replace("tokenizer.py", "joint.py")
    fields = (*SMALL_JOINT, "tokenizer.model.channel_multipliers=(1,)", "tokenizer.loss.adversarial_weight=0.0")
    small = [f"--config.{field}" for field in (*fields, "tokenizer.loss.perceptual_weight=0.0")]
    flags = [f"--config={config}", "--cpu-devices=8", "--json", *small]
    assert main(["plan", *flags, "--mesh=data:2,fsdp:2,codebook:2"]) == 0
    report = json.loads(capsys.readouterr().out)
    axes = {row["axes"] for row in report["collectives"]}
    assert {"codebook", "fsdp"} <= axes and report["flops"] > 0 and report["images_a_step"] == 8
    for more, words in (("--what=sample", "not for stage 'joint', which has train"), ("--search", "--search needs")):
        assert main(["plan", *flags, more]) == 2
        assert words in capsys.readouterr().err


def test_a_plan_of_encoding_holds_no_optimizer(capsys):
    flags = [f"--config={CONFIG}", "--cpu-devices=8", "--mesh=data:8", "--json", *SMALL]
    unused = "--config.discriminator.norm_group=3"  # would not divide the batch in training
    assert main(["plan", *flags, "--what=encode", unused]) == 0
    encoding = json.loads(capsys.readouterr().out)
    config = load_config(CONFIG, SMALL)
    trainer = TokenizerTrainer(config, make_mesh({"data": 8}), steps_per_epoch=1)
    params = jax.eval_shape(lambda: trainer.create_state(0).params)
    used = (leaf.size for name in ("encoder", "quant_conv", "quantize") for leaf in jax.tree.leaves(params[name]))
    assert encoding["what"] == "encode" and encoding["argument_bytes"] == 4 * sum(used) + 16 * 16 * 3
    assert encoding["flops"] > 0


def test_a_plan_of_sampling_reads_every_weight_for_every_code(capsys):
    config = CONFIG.replace("tokenizer.py", "autoregressive.py")
    sizes = ("num_layers=2", "embed_dim=32", "num_heads=2", "num_kv_heads=2", "grid=(4, 4)")
    small = [f"--config.model.{size}" for size in sizes]
    rows = {}
    for scale in (1.0, 2.0):
        flags = [
            f"--config={config}",
            "--cpu-devices=8",
            "--what=sample",
            "--json",
            f"--config.sample.cfg_scale={scale}",
        ]
        assert main(["plan", *flags, *small]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["what"] == "sample" and not report["collectives"]
        rows[scale] = report["flops"]
    assert 1.7 < rows[2.0] / rows[1.0] < 2.1  # guidance evaluates each sample with and without its class


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--cpu-devices=8", "--what=sample"],
            "--what=sample is not for stage 'tokenizer', which has train and encode",
        ),
        (["--topology=v9:2x2"], "topology 'v9:2x2': there is no chip 'v9'; the chips are v4, v5e, v5p, v6e, v7x"),
        (["--topology=v9:2x2"], "as in v5e:4x4, and the GPUs a100, h100, h200, b200, gb200, as in h100:8"),
        (["--topology=h100"], "topology 'h100' is not a number of GPUs, as in h100:8, or of nodes and GPUs a node"),
        (["--topology=h100:16"], "topology 'h100:16': a node has at most 8 GPUs, as in h100:4x8"),
        (["--topology=h100:2x8", "--slices=2"], "--slices=2 is for TPUs; nodes of GPUs are part of the topology"),
        (["--topology=here", "--slices=2"], "--slices=2 is for TPUs"),
        (["--topology=v5e:4x4x4"], "topology 'v5e:4x4x4' is not a shape of 2 dimensions; similar ones: v5e:4x4"),
        (["--topology=v5e"], "topology 'v5e' is not a shape of 2 dimensions"),
        (["--cpu-devices=8", "--mesh=data:3"], "mesh data=3, fsdp=1, codebook=1 does not fit 8 devices"),
        (["--cpu-devices=8", "--mesh=data:8,rows:1"], "mesh axis 'rows' does not exist"),
        (["--cpu-devices=8", "--mesh=data=8"], "'data=8' is not AXIS:SIZE; write it like data:16,codebook:16"),
        (["--cpu-devices=8", "--mesh=codebook:8", "--config.codebook.size=1020"], "codebook.size=1020 does not divide"),
        (["--cpu-devices=8", "--config.codebook.block_size=48"], "in blocks of codebook.block_size=48"),
        (["--cpu-devices=0"], "'0' is not an integer of at least 1"),
        (["--cpu-devices=8", "--topology=v5e:2x2"], "not allowed with argument"),
        ([], "one of the arguments --topology --cpu-devices is required"),
        (["--cpu-devices=8", "--steps=3"], "unknown argument --steps=3"),
    ],
)
def test_wrong_use_is_one_line(flags, words, capsys):
    assert main(["plan", f"--config={CONFIG}", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.skipif(installed("tpu"), reason="libtpu is here")
def test_without_libtpu_the_command_that_installs_it_is_named(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=v5e:2x2"]) == 2
    assert "VENV=.venv-tpu bash launch/setup.sh tpu" in capsys.readouterr().err


@pytest.mark.skipif(installed("gpu"), reason="the compiler is here")
def test_without_the_gpu_compiler_the_command_that_installs_it_is_named(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=h100:8"]) == 2
    error = capsys.readouterr().err
    assert "VENV=.venv-cuda bash launch/setup.sh cuda" in error and error.count("\n") == 1


def test_without_a_gpu_none_is_here(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=here"]) == 2
    error = capsys.readouterr().err
    assert "JAX finds no GPU here" in error and "--topology=h100:8" in error and error.count("\n") == 1


@needs_libtpu
def test_a_shape_that_no_pod_has_is_one_line(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=v5e:3x3"]) == 2
    error = capsys.readouterr().err
    assert "libtpu does not know the topology 'v5e:3x3'" in error and "similar ones: v5e:" in error


@pytest.mark.slow
def test_a_step_larger_than_the_chip_is_reported_and_exits_with_1(capsys, monkeypatch):
    chip = dataclasses.replace(CHIPS["v5e"], hbm_bytes=1e6)
    monkeypatch.setattr(plan_command, "topology_devices", lambda name, slices: (chip, jax.devices()))
    assert main(["plan", f"--config={CONFIG}", "--topology=v5e:2x4", *SMALL]) == 1
    out, error = capsys.readouterr()
    assert "| memory: peak |" in out
    assert (
        "does not fit" in error and "GB over on every chip; try a larger codebook" in error and error.count("\n") == 1
    )


@needs_libtpu
def test_a_program_that_does_not_fit_reports_by_how_much():
    chip, devices = topology_devices("v5e:1x1")
    mesh = make_mesh({"data": 1}, devices)
    x = jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32, sharding=NamedSharding(mesh, P()))
    with pytest.raises(DoesNotFit, match=r"needs .* GiB on a chip, which has 15\.. GiB") as found:
        compile_plan(jax.jit(lambda x: (x @ x) @ x + 1), (x,), mesh, chip)
    assert found.value.needed > 2 * 4 * 60_000**2  # two of the three arrays at least


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_a_tpu(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=v5e:2x4", "--mesh=data:4,codebook:2", *ONE_NETWORK]) == 0
    table = capsys.readouterr().out
    assert "8 v5e chips (data 4, codebook 2)" in table and "bound by HBM" in table and "to spare" in table
    assert "| expected time |" in table and "| expected: matrix products |" in table
    assert "TokenizerModel/decoder" in table and "an estimate without overlap" in table


@needs_libtpu
@pytest.mark.slow
def test_a_plan_of_encoding_counts_no_loop_over_undecided_tokens(capsys):
    flags = [f"--config={CONFIG}", "--topology=v5e:1x1", "--what=encode", *SMALL, "--json"]
    assert main(["plan", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seconds_to_search_again"] > 0
    assert not any("search_again" in group["place"] for group in report["costliest"])
    assert 0 < sum(group["seconds"] for group in report["costliest"]) <= sum(report["expected_seconds"].values())


@needs_gpu_compiler
@pytest.mark.slow
def test_a_plan_for_nodes_of_gpus(capsys):
    flags = [f"--config={CONFIG}", "--topology=h100:2x4", "--mesh=data:4,codebook:2", *SMALL]
    assert main(["plan", *flags]) == 0
    table = capsys.readouterr().out
    assert "8 h100 GPUs in 2 nodes (data 4, codebook 2)" in table and "GB of 84.9 GB" in table
    for row in ("tensor cores", "float32 units", "NVLink", "network"):
        assert f"| bound by {row} |" in table
    for line in table.splitlines():
        if " over " in line:
            assert ("through the network" in line) == ("over data" in line), line
    assert "| all-reduce over data, codebook |" in table and "| all-gather over codebook |" in table
    assert "| cuDNN convolutions |" in table and "| transposes |" in table
    assert "XLA counts" not in table and "autotuning is off" in table
    assert "The commands take 90% of a card's memory (76.4 GB)" in table and "nvidia.com" in table


@needs_gpu_compiler
@pytest.mark.parametrize("what", ["encode", "sample"])
def test_encoding_and_sampling_are_planned_for_gpus(what, capsys):
    sizes = ("num_layers=2", "embed_dim=32", "num_heads=2", "num_kv_heads=2", "grid=(4, 4)")
    small = SMALL if what == "encode" else [f"--config.model.{size}" for size in sizes]
    config = CONFIG if what == "encode" else CONFIG.replace("tokenizer.py", "autoregressive.py")
    assert main(["plan", f"--config={config}", "--topology=gb200:2x4", f"--what={what}", "--json", *small]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["what"] == what and report["tuned"] is False and report["nodes"] == 2 and report["devices"] == 8
    assert report["xla_bytes_accessed"] is None and report["expected_seconds"] == {}
    assert report["flops"] == sum(report["flops_by_bits"].values()) > 0 and not report["bound_seconds"]["network"]
    assert report["kernels"]["Triton products"]["launches"] > (1 if what == "encode" else 16)


@needs_gpu_compiler
def test_only_the_axis_data_spans_nodes(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=h100:2x4", "--mesh=codebook:8", *SMALL]) == 2
    assert "the devices are 2 nodes, and only the axis 'data' can span nodes" in capsys.readouterr().err


@needs_gpu_compiler
def test_a_search_needs_the_clock_of_a_tpu(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=h100:8", "--search"]) == 2
    assert "--search needs --topology of TPUs" in capsys.readouterr().err


@needs_libtpu
def test_slices_share_the_axis_data_alone():
    _, devices = topology_devices("v5e:2x4", slices=2)
    mesh = make_mesh({"data": -1, "codebook": 4}, devices)
    slices = np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh.devices)
    assert mesh.shape["data"] == 4
    np.testing.assert_array_equal(slices[:, 0, :], np.repeat([[0], [0], [1], [1]], 4, axis=1))
    with pytest.raises(UsageError, match="the devices are 2 slices, and only the axis 'data' can span slices"):
        make_mesh({"data": 1, "codebook": 16}, devices)


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_two_slices(capsys):
    flags = ["--topology=v5e:2x4", "--slices=2", "--mesh=data:4,codebook:4", "--config.data.batch_size=16"]
    assert main(["plan", f"--config={CONFIG}", *ONE_NETWORK, *flags]) == 0
    table = capsys.readouterr().out
    assert "16 v5e chips in 2 slices (data 4, codebook 4)" in table and "over codebook" in table
    assert "Collectives over data also cross between the slices" in table


def test_slices_need_a_topology(capsys):
    assert main(["plan", f"--config={CONFIG}", "--cpu-devices=8", "--slices=2"]) == 2
    assert "--slices=2 needs --topology" in capsys.readouterr().err
