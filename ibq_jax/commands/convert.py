"""python -m ibq_jax convert: reads weights from PyTorch, writes weights for PyTorch, and resizes codebooks."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ibq_jax.base.config import PREFIX
from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.commands.arguments import Parser, positive, share
from ibq_jax.interop.from_file import import_file
from ibq_jax.interop.hub import download_if_hub
from ibq_jax.interop.hub_layout import write_hub_folder
from ibq_jax.interop.resize_run import INDEX_MAP, INVERSE_MAP, resize_run
from ibq_jax.interop.to_file import WEIGHTS, export
from ibq_jax.interop.weights import holds_weights
from ibq_jax.pretrained.tensor_files import PICKLED, write_tensors

FILES = (".safetensors", *PICKLED)
SHOWN = 5  # differences that --verify prints


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "convert".

    Raises:
        UsageError: wrong flags; no such run, file or repository; one that is incomplete, or has other tensors than a
            tokenizer or a generator; an --out that exists; a size that the codebook cannot get.
        Failed: with --verify, PyTorch computes something else.
    """
    command_line = parser()
    flags, rest = command_line.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith(PREFIX)]
    for argument in rest:
        if argument not in overrides:
            command_line.error(f"unknown argument {argument}")
    if flags.out is None and not flags.verify:
        command_line.error("give --out=FILE or FOLDER, or --verify")
    if flags.codes is not None and not flags.prune:
        command_line.error("--codes says which codes --prune keeps: give both")
    if flags.out is not None and flags.out.exists():
        raise UsageError(f"--out={flags.out} exists already; name one that does not")
    source = download_if_hub(flags.input)
    if flags.codebook_size or flags.prune:
        _resize(flags, source)
    elif flags.out is not None and (flags.hub or flags.graphs or flags.out.suffix in FILES):
        _export(flags, source)
    elif flags.out is not None and holds_weights(source):
        words = import_file(source, flags.out, flags.config, overrides, flags.tokenizer)
        print(f"wrote {flags.out}/: {source} holds {words}")
    elif flags.out is not None:
        raise UsageError(
            f"--out={flags.out}: a run becomes a file ({', '.join(FILES)}), with --hub a folder for the hub, with "
            "--graphs one of graphs, with --codebook-size or --prune another run"
        )
    if flags.verify:
        _verify(flags, source)


def _export(flags: Namespace, source: Path) -> None:
    tensors, about = export(source, flags.weights)
    if flags.hub:
        write_hub_folder(flags.out, tensors, about)
        print(f"wrote {flags.out}/: model.safetensors, config.json, README.md (the model card) and code for PyTorch")
    elif flags.graphs:
        _write_graphs(flags.out, tensors, about, flags.graphs)
    else:
        write_tensors(flags.out, tensors, about)
        size = sum(tensor.nbytes for tensor in tensors.values())
        print(f"wrote {flags.out}: {about['description']}; {len(tensors):,} tensors, {size / 1e6:,.1f} MB")


def _write_graphs(out: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str], suffix: str) -> None:
    try:
        from ibq_jax.interop import graphs
    except ImportError as error:
        raise UsageError("--graphs needs PyTorch: pip install -r requirements-torch.txt") from error
    files = graphs.write_graphs(out, tensors, json.loads(about["architecture"]), suffix)
    print(f"wrote {out}/: {', '.join(files)}, for batches and sides of any size")


def _resize(flags: Namespace, source: Path) -> None:
    if flags.out is None:
        raise UsageError("--codebook-size and --prune write another run: name it with --out=FOLDER")
    done = resize_run(
        source,
        flags.out,
        codebook_size=None if flags.prune else flags.codebook_size,
        codes=flags.codes,
        multiple_of=flags.multiple_of,
        spread=flags.spread,
    )
    print(f"wrote {flags.out}/: step {done.step} with {done.after:,} codes instead of {done.before:,}")
    print(f"      {flags.out}/{INDEX_MAP}: the old index of every new code, int32 [{done.after}]")
    print(f"      {flags.out}/{INVERSE_MAP}: the new index of every old code, int32 [{done.before}]; -1: dropped")
    print(
        f"next: python -m ibq_jax train --config=... --config.codebook.size={done.after} --workdir={flags.out}, with "
        f"the config of {flags.input} and train.steps over {done.step}"
    )


def _verify(flags: Namespace, source: Path) -> None:
    try:
        from ibq_jax.interop import verify
    except ImportError as error:
        raise UsageError("--verify needs PyTorch: pip install -r requirements-torch.txt") from error
    written = flags.out if flags.out is not None and flags.out.suffix in FILES else None
    report = verify.verify(source, written, flags.weights, flags.images)
    print(f"{report.agreeing:,} of {report.codes:,} {report.origin} are the same in PyTorch and in JAX")
    print(f"{len(report.differences):,} tensors compared; largest differences, relative to the tensor's magnitude:")
    for difference in sorted(report.differences, key=lambda difference: -difference.relative)[:SHOWN]:
        print(
            f"  {difference.name}: {difference.relative:.1e} ({difference.largest:.1e} of {difference.magnitude:.3g})"
        )
    first = report.first_beyond
    if first is not None:
        raise Failed(
            f"PyTorch computes something else: {first.name} is the first to differ by more than {verify.TOLERANCE:g} "
            f"of its largest magnitude, by {first.relative:.1e}"
        )


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "convert",
        "Reads weights from PyTorch, writes weights for PyTorch, and makes runs with another codebook size.",
        examples=[
            "--in=imagenet256_16384.ckpt --out=runs/imported",
            "--in=hf://TencentARC/IBQ-AR-B --out=runs/B --tokenizer=runs/imported",
            "--in=hf://BAAI/Emu3.5-VisionTokenizer --out=runs/emu35",
            "--in=runs/tokenizer --out=tokenizer.safetensors --verify",
            "--in=runs/tokenizer --out=hub --hub",
            "--in=runs/tokenizer --out=graphs --graphs=onnx",
            "--in=runs/codes1024 --out=runs/codes8192 --codebook-size=8192",
            "--in=runs/emu35 --out=runs/pruned --prune --codes=runs/codes",
        ],
        notes=(
            "The kind of --out decides: from a file of weights, a folder becomes a run; from a run, a file gets its\n"
            f"weights. {PREFIX}NAME=VALUE overrides a field of the new run's config."
        ),
    )
    parser.add_argument(
        "--in",
        dest="input",
        required=True,
        metavar="SOURCE",
        help="What to read: a run's folder, a step's folder under its checkpoints/, a file of weights (.safetensors, "
        ".ckpt, .pt, .pth), a folder with model.safetensors or model.ckpt (and config.json or config.yaml), or "
        "hf://OWNER/NAME.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="What to write: the folder of a new run, or a .safetensors, .ckpt, .pt or .pth file; it must not exist. "
        "Default: nothing, with --verify.",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="all",
        help="Weights of a tokenizer's run to write: all that a published file holds, only the averaged (ema), or only "
        "the raw ones. Default: all.",
    )
    parser.add_argument(
        "--hub",
        action="store_true",
        help="Write --out as a folder for the Hugging Face hub: the weights that a model computes with, a model card, "
        "and code for PyTorch and for AutoModel of transformers.",
    )
    parser.add_argument(
        "--graphs",
        choices=("onnx", "pt2"),
        help="Write --out as a folder with a tokenizer's encode and decode as ONNX, or as programs of torch.export "
        "(pt2). Default: neither.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Compare what PyTorch and JAX compute, layer by layer; needs PyTorch.",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="Folder of images that --verify uses for a tokenizer. Default: images of the embedded data set.",
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="FILE:PRESET",
        help="Preset that gives a new run the fields which a file does not say. Default: the preset of its size.",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="RUN",
        help="Tokenizer's run that decodes the codes of a new generator's run. Default: the one in the file, if any.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--codebook-size",
        type=positive,
        metavar="N",
        help="Write a run whose codebook has N codes, more than now, by splitting codes. Default: unchanged.",
    )
    size.add_argument(
        "--prune",
        action="store_true",
        help="Write a run without the codes that the validation split, or the token cache --codes, does not use.",
    )
    parser.add_argument(
        "--codes",
        type=Path,
        metavar="DIR",
        help="Token cache of --in whose codes --prune keeps, of all its splits. Default: the validation split's codes.",
    )
    parser.add_argument(
        "--multiple-of",
        type=positive,
        default=64,
        metavar="N",
        help="The size that --prune reaches is a multiple of N codes. Default: 64.",
    )
    parser.add_argument(
        "--spread",
        type=share,
        default=0.02,
        help="Distance of the copies of a split code from it, relative to the root mean square of the codebook. "
        "Default: 0.02.",
    )
    return parser
