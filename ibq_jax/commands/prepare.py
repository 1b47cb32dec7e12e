"""python -m ibq_jax prepare: builds a data set for training from files that are already on this machine."""

import functools
import os
import re
import shlex
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.commands.arguments import Parser, share
from ibq_jax.data.beam_dataset import write_dataset_with_beam
from ibq_jax.data.beam_map import LOCAL_RUNNER, find_beam
from ibq_jax.data.folders import image_folder
from ibq_jax.data.imagenet import EXPECTED_IMAGES, imagenet2012
from ibq_jax.data.openmoji import openmoji
from ibq_jax.data.sources import ImageCollection
from ibq_jax.data.store import WriteSummary, find_dataset, made_with, write_dataset
from ibq_jax.data.tar_shards import tar_shards

CLASSES_LISTED = 20
HOW = ("collect", "data_dir", "overwrite", "beam", "beam_options")  # flags that change nothing in the data set
PRESETS = {
    "openmoji": "openmoji64",
    "folder": "imagenet256_16384",
    "tar": "pretrain256_16384",
    "imagenet": "imagenet256_16384",
}


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "prepare".

    Raises:
        UsageError: wrong flags, a source that is missing or holds nothing readable, or a data set of the same name that
            was made with other settings.
    """
    args = parser().parse_args(argv)
    if args.name is None:
        args.name = _name_from_folder(args.input)
    settings = {key: value for key, value in vars(args).items() if key not in HOW}
    existing = find_dataset(args.name, args.data_dir)
    if existing and not args.overwrite:
        _check_same_settings(existing, settings)
        print(f"{existing} is there already; --overwrite builds it anew")
    else:
        _describe(*_write(args, settings))
    print(f"next: {_next_command(args)}")


def _write(args: Namespace, settings: dict) -> tuple[ImageCollection, WriteSummary]:
    if args.beam is None:
        if args.beam_options:
            raise UsageError("--beam_options goes with --beam")
        collection = args.collect(args, map)
        return collection, write_dataset(collection, args.data_dir, settings, args.overwrite)
    collect, runner = functools.partial(args.collect, args), find_beam(args.beam, args.beam_options)
    return write_dataset_with_beam(collect, args.name, args.data_dir, settings, runner, args.overwrite)


def parser() -> Parser:
    parser = Parser("prepare", __doc__.partition(": ")[2])
    sources = parser.add_subparsers(title="sources", dest="source", metavar="SOURCE", required=True)

    emoji = sources.add_parser("openmoji", help="the embedded data set: 1,898 colour pictures in 9 categories")
    emoji.add_argument("--size", type=int, default=128, help="pixels of a side (default: 128)")
    emoji.add_argument("--name", type=_dataset_name, default="openmoji", help="of the data set (default: openmoji)")
    emoji.set_defaults(collect=lambda args, _: openmoji(args.size, args.name), beam=None, beam_options="")

    folder = sources.add_parser("folder", help="a folder of images: a class per subfolder, or no classes")
    folder.add_argument("--in", dest="input", required=True, type=os.path.abspath, metavar="DIR", help="the folder")
    folder.add_argument("--name", type=_dataset_name, help="of the data set (default: the folder's)")
    folder.set_defaults(collect=lambda args, _: image_folder(args.input, args.name, args.validation))

    tar = sources.add_parser("tar", help="webdataset shards: images with .cls or .json labels, or none")
    tar.add_argument(
        "--in", dest="input", required=True, type=os.path.abspath, metavar="'DIR/*.tar'", help="the shards"
    )
    tar.add_argument("--name", type=_dataset_name, required=True, help="of the data set")
    tar.set_defaults(collect=lambda args, each: tar_shards(args.input, args.name, args.validation, each))

    imagenet = sources.add_parser("imagenet", help="ImageNet 2012 from its two tars, as data set imagenet2012")
    imagenet.add_argument("--tars", required=True, type=os.path.abspath, metavar="DIR", help="the folder of the tars")
    imagenet.set_defaults(collect=lambda args, _: imagenet2012(args.tars), name="imagenet2012")

    for source in (folder, tar):
        source.add_argument(
            "--validation", type=share, default=0.05, metavar="FRACTION", help="held out (default: 0.05)"
        )
    for source in (folder, tar, imagenet):
        source.add_argument(
            "--beam",
            nargs="?",
            const=LOCAL_RUNNER,
            metavar="RUNNER",
            help="work on an Apache Beam runner; restartable (default: every core of this machine)",
        )
        source.add_argument("--beam-options", default="", metavar="'--OPTION=VALUE ...'", help="of the runner")
    for source in (emoji, folder, tar, imagenet):
        source.add_argument("--data-dir", default="data", help="where the data sets are (default: data)")
        source.add_argument("--overwrite", action="store_true", help="build it anew if it is there")
    return parser


def _dataset_name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise ArgumentTypeError(f"{text!r} is no name for a data set: small letters, digits and _, a letter first")
    return text


def _name_from_folder(folder: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", Path(folder).name.lower()).strip("_")
    if not name[:1].isalpha():
        raise UsageError(f"{folder} does not make a data set's name: give one with --name=NAME")
    return name


def _check_same_settings(existing: Path, settings: dict) -> None:
    before = made_with(existing)
    if before not in (None, settings):
        made = " ".join(f"{key}={value}" for key, value in before.items() if settings.get(key) != value)
        asked = " ".join(f"{key}={value}" for key, value in settings.items() if before.get(key) != value)
        raise UsageError(f"{existing} was made with {made}, not {asked}: pass --overwrite, or choose another --name")


def _describe(collection: ImageCollection, written: WriteSummary) -> None:
    """Says what was stored, what was left out and whose the images are."""
    print(f"wrote {written.path}")
    for split, counts in written.counts.items():
        print(f"  {split}: {counts.total():,} images{_by_class(collection.class_names, counts)}")
        if collection.name == "imagenet2012" and counts.total() != EXPECTED_IMAGES[split]:
            print(f"    ImageNet 2012 has {EXPECTED_IMAGES[split]:,} there: these numbers compare with no one's")
    if "validation" not in written.counts:
        print("  no validation images: a larger --validation keeps some back")
    if written.skipped:
        print(f"  {len(written.skipped):,} unreadable, skipped: named above and in {written.path / 'metadata.json'}")
    if collection.license:
        print(f"{collection.description} Licence: {collection.license}. Source: {collection.citation}.")


def _by_class(class_names: tuple[str, ...], counts: Counter) -> str:
    if not class_names:
        return ", no classes"
    if len(class_names) <= CLASSES_LISTED:
        return " (" + ", ".join(f"{counts[label]:,} {name}" for label, name in enumerate(class_names)) + ")"
    sizes = [counts[label] for label in range(len(class_names))]
    return f" of {len(class_names):,} classes, {min(sizes):,} to {max(sizes):,} each"


def _next_command(args: Namespace) -> str:
    command = f"python -m ibq_jax train --config=configs/tokenizer.py:{PRESETS[args.source]}"
    if args.name not in ("openmoji", "imagenet2012"):
        command += f" --config.data.name={args.name}"
    if args.data_dir != "data":
        command += f" --config.data.dir={shlex.quote(args.data_dir)}"
    return f"{command} --workdir=runs/tok"
