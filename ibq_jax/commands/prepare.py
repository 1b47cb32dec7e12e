"""python -m ibq_jax prepare: builds a data set for training from files that are already on this machine."""

import functools
import os
import re
import shlex
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.commands.arguments import Parser, count, positive, share
from ibq_jax.data.batches import NO_LABEL
from ibq_jax.data.beam_dataset import write_dataset_with_beam
from ibq_jax.data.beam_map import LOCAL_RUNNER, find_beam
from ibq_jax.data.folders import image_folder
from ibq_jax.data.imagenet import EXPECTED_IMAGES, imagenet2012
from ibq_jax.data.openmoji import openmoji
from ibq_jax.data.photos import photographs
from ibq_jax.data.sources import ImageCollection
from ibq_jax.data.store import WriteSummary, find_dataset, made_with, write_dataset
from ibq_jax.data.tar_shards import tar_shards
from ibq_jax.data.windows import Windows, in_windows

CLASSES_LISTED = 20
WINDOW_SIZE = 64  # pixels
HOW = ("collect", "data_dir", "overwrite", "beam", "beam_options")  # flags that do not change the data set's content
SOURCES = {  # a line of help, examples
    "openmoji": (
        "the embedded data set: 1,898 colour images in 9 categories",
        ["--data-dir=/data", "--size=256 --name=openmoji256"],
    ),
    "photos": (
        "windows of the 8 colour photographs inside scikit-image; those of 2 are for validation",
        ["", "--size=32", "--size=32 --windows=1000 --seed=1 --name=photos32_more"],
    ),
    "folder": (
        "a folder of images, with a subfolder per class or without classes",
        [
            "--in=photos",
            "--in=photos --name=photos --validation=0.1 --data-dir=/data",
            "--in=photos --windows=50 --size=64",
        ],
    ),
    "tar": (
        "webdataset tar shards: images with .cls or .json labels, or without labels",
        [
            "--in='shards/*.tar' --name=web",
            "--in='shards/*.tar' --name=web --beam --beam-options='--direct_num_workers=8'",
        ],
    ),
    "imagenet": (
        "ImageNet 2012 from its two tars, as data set imagenet2012",
        ["--tars=downloads", "--tars=downloads --data-dir=/data --overwrite"],
    ),
}
PRESETS = {
    "openmoji": "openmoji64",
    "photos": "photos64",
    "folder": "imagenet256_16384",
    "tar": "pretrain256_16384",
    "imagenet": "imagenet256_16384",
}


def main(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: the words after "prepare".

    Raises:
        UsageError: wrong flags, a source that is missing or holds nothing readable, or a data set of the same name that
            was made with other settings.
    """
    args = parser().parse_args(argv)
    if "windows" in args:
        _resolve_windows(args)
    if args.name is None:
        args.name = f"photos{args.size}" if args.source == "photos" else _name_from_folder(args.input)
    settings = {key: value for key, value in vars(args).items() if key not in HOW and value is not None}
    existing = find_dataset(args.name, args.data_dir)
    if existing and not args.overwrite:
        _check_same_settings(existing, settings)
        print(f"{existing} is there already; --overwrite builds it again")
    else:
        _describe(*_write(args, settings))
    print(f"next: {_next_command(args)}")


def _write(args: Namespace, settings: dict) -> tuple[ImageCollection, WriteSummary]:
    if args.beam is None:
        if args.beam_options:
            raise UsageError("--beam-options goes with --beam")
        collection = args.collect(args, map)
        return collection, write_dataset(collection, args.data_dir, settings, args.overwrite)
    collect, runner = functools.partial(args.collect, args), find_beam(args.beam, args.beam_options)
    return write_dataset_with_beam(collect, args.name, args.data_dir, settings, runner, args.overwrite)


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "prepare",
        "Builds a data set for training from files that are already on this machine; nothing is downloaded.",
        examples=[
            "openmoji",
            "photos --size=32",
            "folder --in=photos --name=photos",
            "tar --in='shards/*.tar' --name=web --validation=0.01 --beam",
            "imagenet --tars=downloads --data-dir=/data",
        ],
        notes="Each source has flags and examples of its own: python -m ibq_jax prepare SOURCE --help",
    )
    sources = parser.add_subparsers(title="sources", dest="source", metavar="SOURCE", required=True)
    emoji, photos, folder, tar, imagenet = (_source(sources, name) for name in PRESETS)

    emoji.add_argument("--size", type=int, default=128, metavar="N", help="Pixels per side, 8 to 2048. Default: 128.")
    emoji.add_argument("--name", type=_dataset_name, default="openmoji", help="The data set's name. Default: openmoji.")
    emoji.set_defaults(collect=lambda args, _: openmoji(args.size, args.name), beam=None, beam_options="")

    _add_windows(photos, 400, "Windows of every photograph, which become images. Default: 400.")
    photos.add_argument("--name", type=_dataset_name, help="The data set's name. Default: photos and the size.")
    photos.set_defaults(collect=lambda args, _: _windowed(photographs(args.name), args), beam=None, beam_options="")

    _add_input(folder, "DIR", "Folder of images (.jpg .jpeg .png .webp .bmp), with or without a subfolder per class.")
    folder.add_argument("--name", type=_dataset_name, help="The data set's name. Default: made of the folder's name.")
    _add_windows(folder, None, "Store N random windows of every image in place of it. Default: the image.")
    folder.set_defaults(collect=lambda args, _: _windowed(image_folder(args.input, args.name, args.validation), args))

    _add_input(tar, "'DIR/*.tar'", "Pattern of the shards' paths, in quotes; gzip, bzip2 and xz are unpacked.")
    tar.add_argument("--name", type=_dataset_name, required=True, help="The data set's name.")
    tar.set_defaults(
        collect=lambda args, parallel_map: tar_shards(args.input, args.name, args.validation, parallel_map)
    )

    imagenet.add_argument(
        "--tars",
        required=True,
        type=os.path.abspath,
        metavar="DIR",
        help="Folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.",
    )
    imagenet.set_defaults(collect=lambda args, _: imagenet2012(args.tars), name="imagenet2012")

    for source in (folder, tar):
        source.add_argument(
            "--validation",
            type=share,
            default=0.05,
            metavar="FRACTION",
            help="Fraction of the images to hold out, at least 0 and below 1. Default: 0.05.",
        )
    for source in (folder, tar, imagenet):
        _add_beam(source)
    for source in (emoji, photos, folder, tar, imagenet):
        source.add_argument("--data-dir", default="data", help="Folder that holds all data sets. Default: data.")
        source.add_argument("--overwrite", action="store_true", help="Replace the data set if it exists.")
    return parser


def _source(sources, name: str) -> Parser:
    """Adds the parser of one source."""
    words, examples = SOURCES[name]
    return sources.add_parser(
        name,
        command=f"prepare {name}",
        description=words[0].upper() + words[1:] + ".",
        examples=examples,
        help=words,
    )


def _add_input(source: Parser, metavar: str, words: str) -> None:
    source.add_argument("--in", dest="input", required=True, type=os.path.abspath, metavar=metavar, help=words)


def _add_windows(source: Parser, windows: int | None, words: str) -> None:
    source.add_argument("--windows", type=positive, default=windows, metavar="N", help=words)
    source.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="Pixels per side of a window, 8 to 1024; it covers 1, 2, 4, ... times as many of its image. "
        f"Default: {WINDOW_SIZE}.",
    )
    source.add_argument("--seed", type=count, help="Seed of the windows' places and scales. Default: 0.")


def _resolve_windows(args: Namespace) -> None:
    """Fills in the windows' size and seed, which are part of the data set's settings."""
    if args.windows is not None:
        args.size = WINDOW_SIZE if args.size is None else args.size
        args.seed = args.seed or 0
    elif args.size is not None or args.seed is not None:
        raise UsageError("--size and --seed are of windows: they go with --windows=N")


def _windowed(collection: ImageCollection, args: Namespace) -> ImageCollection:
    return in_windows(collection, Windows(args.windows, args.size, args.seed)) if args.windows else collection


def _add_beam(source: Parser) -> None:
    source.add_argument(
        "--beam",
        nargs="?",
        const=LOCAL_RUNNER,
        metavar="RUNNER",
        help="Spread the work over the workers of an Apache Beam runner; a rerun continues; --beam alone means "
        f"{LOCAL_RUNNER}. Default: no Beam, all cores of this machine.",
    )
    source.add_argument(
        "--beam-options",
        default="",
        metavar="'--OPTION=VALUE ...'",
        help="Options of the Beam runner, in quotes. Default: none.",
    )


def _dataset_name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise ArgumentTypeError(
            f"{text!r} is not a data set's name: use small letters, digits and _, starting with a letter"
        )
    return text


def _name_from_folder(folder: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", Path(folder).name.lower()).strip("_")
    if not name[:1].isalpha():
        raise UsageError(f"{folder} does not give a data set's name: choose one with --name=NAME")
    return name


def _check_same_settings(existing: Path, settings: dict) -> None:
    before = made_with(existing)
    if before not in (None, settings):
        made = " ".join(f"{key}={value}" for key, value in before.items() if settings.get(key) != value)
        asked = " ".join(f"{key}={value}" for key, value in settings.items() if before.get(key) != value)
        raise UsageError(f"{existing} was made with {made}, not {asked}: pass --overwrite, or choose another --name")


def _describe(collection: ImageCollection, written: WriteSummary) -> None:
    """Prints what was stored, what was skipped, and the images' licence."""
    print(f"wrote {written.path}")
    for split, counts in written.counts.items():
        print(f"  {split}: {counts.total():,} images{_by_class(collection.class_names, counts)}")
        if collection.name == "imagenet2012" and counts.total() != EXPECTED_IMAGES[split]:
            print(
                f"    warning: ImageNet 2012 has {EXPECTED_IMAGES[split]:,} there; results will not be comparable with "
                "published numbers"
            )
    if "validation" not in written.counts:
        print("  no validation images: a larger --validation holds some out")
    if written.skipped:
        print(f"  {len(written.skipped):,} unreadable, skipped: named above and in {written.path / 'metadata.json'}")
    if collection.license:
        print(f"{collection.description} Licence: {collection.license}. Source: {collection.citation}.")


def _by_class(class_names: tuple[str, ...], counts: Counter) -> str:
    if not class_names:
        return ", no classes"
    if counts.keys() == {NO_LABEL}:
        return " of none of the classes"
    if len(class_names) <= CLASSES_LISTED:
        return " (" + ", ".join(f"{counts[label]:,} {name}" for label, name in enumerate(class_names)) + ")"
    sizes = [counts[label] for label in range(len(class_names))]
    return f" of {len(class_names):,} classes, {min(sizes):,} to {max(sizes):,} each"


def _next_command(args: Namespace) -> str:
    preset = PRESETS[args.source]
    if args.source in ("openmoji", "photos") and args.size in (32, 64):
        preset = f"{args.source}{args.size}"
    command = f"python -m ibq_jax train --config=configs/tokenizer.py:{preset}"
    if args.name != {"openmoji": "openmoji", "photos": preset, "imagenet": "imagenet2012"}.get(args.source):
        command += f" --config.data.name={args.name}"
    if args.data_dir != "data":
        command += f" --config.data.dir={shlex.quote(args.data_dir)}"
    return f"{command} --workdir=runs/tok"
