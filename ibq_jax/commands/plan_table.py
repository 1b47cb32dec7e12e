"""Puts a plan into words for `plan`: its figures as one JSON object, and as tables in Markdown."""

import dataclasses

import jax

from ibq_jax.plan.compiled import Plan
from ibq_jax.plan.gpus import Gpu
from ibq_jax.plan.kernels import by_kind

TRAIN, ENCODE, SAMPLE = "train", "encode", "sample"
RUN = {TRAIN: "images per step", ENCODE: "images encoded at a time", SAMPLE: "samples drawn at a time"}
GB = 1e9
PEAKS = (
    "Peaks of {device}: {flops:.3g} operations/s in bfloat16, {hbm_bytes_per_second:.3g} bytes/s of HBM, "
    "{ici_bytes_per_second:.3g} bytes/s to its neighbours ({source})."
)
GPU_PEAKS = (
    "Peaks of one {device_kind}: {flops:.3g} operations/s in bfloat16, half of that in TF32, {float32_flops:.3g} in "
    "float32 outside of the tensor cores, {hbm_bytes_per_second:.3g} bytes/s of HBM; in one direction "
    "{nvlink_bytes_per_second:.3g} bytes/s through NVLink and {network_bytes_per_second:.3g} to other nodes ({source})."
)
BETWEEN_SLICES = (
    "Collectives over data also cross between the slices. The speed of that network is unknown here; the bound by "
    "interconnect assumes the speed inside a slice."
)
ESTIMATE = (
    "The expected time is what the TPU's compiler writes next to each operation, added up: an estimate without "
    "overlap, not a measurement. Collectives are counted at the links' peak, as the compiler estimates none."
)
UNTUNED = (
    "The card is not here, so XLA's autotuning is off: on a card it tries out cuDNN's algorithms, cuBLAS and Triton "
    "for each product, and tiles, and keeps the fastest, which may take scratch memory and other kernels than these. "
    "Operations, collectives and the other kernels stay."
)
GPU_FIGURES = (
    "Operations, bytes and kernels are counted in the compiled text, each loop as often as it runs, as if every kernel "
    "read and wrote its arrays once and the L2 cache kept none, so that HBM may be needed for less. "
    "The commands take {share:.0%} of a card's memory ({available:.1f} GB) unless "
    "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."
)
PREALLOCATED = 0.9  # of a GPU's memory, by ibq_jax/__main__.py
LISTED = 10  # places in the model that are listed


def describe(plan: Plan, config: str, batch_size: int, mesh: jax.sharding.Mesh, slices: int) -> dict:
    """Returns all figures of a plan, as `plan --json` writes them."""
    bounds, expected, chip = plan.bounds, plan.expected_seconds, plan.chip
    binding = max(bounds, key=lambda name: bounds[name]) if bounds else None
    total = sum(expected.values())
    operations = plan.clock.operations[:LISTED] if plan.clock else ()
    return {
        "config": config,
        "mesh": dict(mesh.shape),
        "devices": plan.devices,
        "slices": slices,
        "nodes": len({device.process_index for device in mesh.devices.flat}),
        "images_a_step": batch_size,
        "chip": dataclasses.asdict(chip) | {"devices_per_chip": chip.devices_per_chip} if chip else None,
        "argument_bytes": plan.memory.arguments,
        "temporary_bytes": plan.memory.temporaries,
        "peak_bytes": plan.memory.peak,
        "spare_share": plan.memory.spare(chip.hbm_bytes) if chip else None,
        "flops": plan.flops,
        "flops_by_bits": plan.flops_by_bits,
        "hbm_bytes": plan.hbm_bytes,
        "xla_bytes_accessed": plan.accessed_bytes,
        "bound_seconds": bounds,
        "binding": binding,
        "images_a_second_at_best": batch_size / bounds[binding] if binding else None,
        "expected_seconds": expected,
        "seconds_to_search_again": plan.clock.left_out if plan.clock else 0.0,
        "expected_images_a_second": batch_size / total if total else None,
        "expected_share_of_peak": bounds["matrix units"] / total if total else None,
        "kernels_without_estimate": plan.clock.unknown if plan.clock else None,
        "costliest": [dataclasses.asdict(group) for group in operations],
        "kernels": {kind: {"launches": n, "bytes": size} for kind, (n, size) in by_kind(plan.kernels).items()},
        "most_traffic": [dataclasses.asdict(group) for group in plan.kernels[:LISTED]],
        "tuned": None if not plan.kernels else _is_here(mesh),
        "collectives": [dataclasses.asdict(traffic) for traffic in plan.collectives],
        "compile_seconds": plan.compile_seconds,
    }


def _is_here(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0] in jax.devices()


def table(report: dict) -> str:
    """Returns tables of the figures that `describe` returned."""
    chip, mesh = report["chip"], ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    gpus = bool(report["kernels"])
    unit = "GPUs" if gpus else "chips" if not chip or chip["devices_per_chip"] == 1 else "halves of chips"
    kind = f"{chip['name']} {unit}" if chip else unit if gpus else "simulated devices"
    if report["slices"] > 1:
        kind += f" in {report['slices']} slices"
    elif gpus and report["nodes"] > 1:
        kind += f" in {report['nodes']} nodes"
    title = f"{report['config']}, {report['images_a_step']} {RUN[report['what']]} on {report['devices']} {kind}"
    lines = [f"{title} ({mesh or 'one device'}); each device's share of a step:", "", "| what | figure |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _figures(report, unit)]
    if report["costliest"]:
        lines += _costliest(report)
    if gpus:
        lines += _kernels(report)
    if chip and not gpus:
        device = "half a {name} chip, which is one device" if unit == "halves of chips" else "a {name} chip"
        lines += ["", PEAKS.format(device=device.format_map(chip), **chip)]
    return "\n".join(lines + ([BETWEEN_SLICES] if report["slices"] > 1 else []))


def _figures(report: dict, unit: str) -> list[tuple[str, str]]:
    """Returns the names and values of the first table."""
    chip, counted = report["chip"], report["xla_bytes_accessed"]
    capacity = f" of {chip['hbm_bytes'] / GB:.1f} GB, {report['spare_share']:.0%} to spare" if chip else ""
    traffic = f"{report['hbm_bytes'] / GB:.2f} GB"
    rows = [
        ("memory: arguments", f"{report['argument_bytes'] / GB:.2f} GB"),
        ("memory: temporaries", f"{report['temporary_bytes'] / GB:.2f} GB"),
        ("memory: peak", f"{report['peak_bytes'] / GB:.2f} GB{capacity}"),
        ("matrix products", f"{report['flops'] / 1e12:.2f} TFLOP"),
        ("memory traffic", traffic + (f" (XLA counts {counted / GB:.2f} GB)" if counted is not None else "")),
        *((f"bound by {side}", f"{1e3 * seconds:.1f} ms") for side, seconds in report["bound_seconds"].items()),
    ]
    if chip:
        best = f"{report['images_a_second_at_best']:,.0f} images/s, bound by {report['binding']}"
        rows.append((f"all {report['devices']} {unit} at best", best))
    if expected := report["expected_seconds"]:
        total = (
            f"{1e3 * sum(expected.values()):.1f} ms, {report['expected_share_of_peak']:.0%} of the matrix units' peak"
        )
        rows.append(("expected time", total))
        rows += [(f"expected: {kind}", f"{1e3 * seconds:.1f} ms") for kind, seconds in expected.items()]
        if report["seconds_to_search_again"]:
            again = f"{1e3 * report['seconds_to_search_again']:.1f} ms"
            rows.append(("not in it: tokens that the search looks at again, each time", again))
        expected_rate = f"{report['expected_images_a_second']:,.0f} images/s expected"
        rows.append((f"all {report['devices']} {unit}", expected_rate))
    for row in report["collectives"]:
        through = f", {row['network_bytes'] / 1e6:,.1f} MB through the network" if row["network_bytes"] else ""
        rows.append((f"{row['kind']} over {row['axes']}", f"{row['count']:,} x, {row['bytes'] / 1e6:,.1f} MB{through}"))
    return [*rows, ("compiled in", f"{report['compile_seconds']:.0f} s")]


def _costliest(report: dict) -> list[str]:
    """Returns lines about the operations that a TPU's compiler expects to take longest."""
    lines = ["", "| costliest operations, by place | kind | runs | expected |", "|---|---|---|---|"]
    lines += [
        f"| {row['place']} | {row['kind']} | {row['times']:,} | {1e3 * row['seconds']:.2f} ms |"
        for row in report["costliest"]
    ]
    unknown = report["kernels_without_estimate"]
    return [*lines, "", ESTIMATE + (f" {unknown:,} runs of kernels have no estimate." if unknown else "")]


def _kernels(report: dict) -> list[str]:
    """Returns lines about what a GPU runs, and about how that was found."""
    lines = ["", "| kernels | launches | memory traffic |", "|---|---|---|"]
    lines += [
        f"| {kind} | {row['launches']:,} | {row['bytes'] / GB:.2f} GB |" for kind, row in report["kernels"].items()
    ]
    launches = sum(row["launches"] for row in report["kernels"].values())
    lines += [f"| all | {launches:,} | {report['hbm_bytes'] / GB:.2f} GB |"]
    lines += ["", "| most memory traffic, by place | kind | launches | memory traffic |", "|---|---|---|---|"]
    lines += [
        f"| {row['place']} | {row['kind']} | {row['launches']:,} | {row['bytes'] / GB:.2f} GB |"
        for row in report["most_traffic"]
    ]
    lines += ["", *([] if report["tuned"] else [UNTUNED])]
    if chip := report["chip"]:
        gpu = Gpu(**{field.name: chip[field.name] for field in dataclasses.fields(Gpu)})
        available = PREALLOCATED * gpu.hbm_bytes / GB
        lines.append(GPU_FIGURES.format(share=PREALLOCATED, available=available))
        lines.append(GPU_PEAKS.format(float32_flops=gpu.float32_flops, **dataclasses.asdict(gpu)))
    return lines
