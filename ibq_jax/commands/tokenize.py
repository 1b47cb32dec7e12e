"""python -m ibq_jax tokenize: stores the codes of a data set's images, or images of mixed sizes, in a token cache."""

import functools
import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path, resolve
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.base.processes import barrier, joined
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.commands.arguments import Parser, positive
from ibq_jax.commands.export import add_format_flags, check_format_flags, export
from ibq_jax.data.any_size import MAX_PIXELS, MIN_PIXELS
from ibq_jax.data.mixed_cache import read_mixed_manifest
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.preprocess import VIEWS
from ibq_jax.data.raw_images import find_images
from ibq_jax.data.token_cache import COMPARED, SHEET, read_manifest
from ibq_jax.evaluate.check_cache import check_token_cache
from ibq_jax.evaluate.check_mixed_cache import check_mixed_cache
from ibq_jax.interop.renumber import renumbered_codes
from ibq_jax.tokenizer.model import downsampling
from ibq_jax.tokenizer.restore import restore_run
from ibq_jax.tokenizer.tokenize import TokenizeJob, check_job, tokenize
from ibq_jax.tokenizer.tokenize_mixed import MixedJob, check_mixed_job, tokenize_mixed

SPLITS = ("train", "validation")  # their names in the cache
TRAINING_VIEWS, VALIDATION_VIEWS = ("centre", "flip"), ("centre",)
MAX_SHAPES = 24
SQUARE_FLAGS = ("views", "resize", "data", "data_dir", "splits", "batch_size", "renumber")
MIXED_FLAGS = ("min_pixels", "max_pixels", "max_shapes", "batch_tokens")
WHICH = "a data set's images are cropped to squares, images of mixed sizes keep their own"


def main(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: the words after "tokenize".

    Raises:
        UsageError: wrong flags, no run or nothing saved in it, no such data set or split, an --out that is something
            else or a cache of other settings, or an image that cannot be decoded.
    """
    flags = parser().parse_args(argv)
    _check_together(flags)
    config = SavedRun.find(flags.run, "tokenizer", needed="a tokenizer").config
    job = _mixed_job(flags, config) if flags.images else _job(flags, config)
    check_mixed_job(job) if isinstance(job, MixedJob) else check_job(job)  # before the weights are read
    trainer, restored = restore_run(flags.run)
    params = restored.state.weights(flags.weights)
    origin = {
        "path": str(resolve(flags.run)),
        "step": restored.step,
        "weights": flags.weights,
        "config": trainer.config.to_dict(),
    }
    how = {
        "overwrite": flags.overwrite,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if isinstance(job, MixedJob):
        check = functools.partial(check_mixed_cache, model=trainer.model, params=params, job=job)
        manifest = tokenize_mixed(trainer.model, params, job, flags.out, origin, check=check, **how)
    else:
        check = functools.partial(check_token_cache, model=trainer.model, params=params, job=job)
        known = None
        if flags.renumber is not None:
            model = trainer.model.for_encoding(job.precision)
            known = renumbered_codes(flags.renumber, flags.run, model, params)
        manifest = tokenize(trainer.model, params, job, flags.out, origin, check=check, known=known, **how)
    barrier("tokenized")  # the process that finishes last completes the cache
    if joined():
        manifest = (read_mixed_manifest if flags.images else read_manifest)(flags.out.resolve())
    if manifest is None:
        print(f"{flags.out}: this process is done; the last process to finish completes the cache")
    else:
        (_describe_mixed if flags.images else _describe)(flags.out, manifest)
        if flags.format:
            export(flags.out, flags.out / flags.format, flags)


def _check_together(flags: Namespace) -> None:
    """Raises UsageError for flags of the one kind of cache with the other, or of files that are not asked for."""
    check_format_flags(flags, mixed=bool(flags.images))
    others = SQUARE_FLAGS if flags.images else MIXED_FLAGS
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(flags, name) is not None]
    if given:
        how = "cannot go with" if flags.images else "needs" if len(given) == 1 else "need"
        raise UsageError(f"{', '.join(given)} {how} --images: {WHICH}")


def _mixed_job(flags: Namespace, config: ConfigDict) -> MixedJob:
    """Returns the job that the flags describe; missing flags take the values of the tokenizer's config."""
    data = config.data
    tokens = (data.image_size // downsampling(config)) ** 2
    return MixedJob(
        images=find_images(flags.images),
        min_pixels=flags.min_pixels or min(MIN_PIXELS, flags.max_pixels or MIN_PIXELS),
        max_pixels=flags.max_pixels or max(MAX_PIXELS, flags.min_pixels or MAX_PIXELS),
        max_shapes=flags.max_shapes or MAX_SHAPES,
        batch_tokens=flags.batch_tokens or config.evaluate.batch_size * tokens,
        num_threads=flags.num_threads or max(1, data.num_threads),
        precision=flags.precision or config.encode.precision,
    )


def _job(flags: Namespace, config: ConfigDict) -> TokenizeJob:
    """Returns the job that the flags describe; missing flags take the values of the tokenizer's config."""
    data = config.data
    name, data_dir = flags.data or data.name, flags.data_dir or data.dir
    splits = flags.splits or (data.train_split, data.validation_split)
    return TokenizeJob(
        sources={split: open_split(name, data_dir, source) for split, source in zip(SPLITS, splits, strict=True)},
        views=dict(zip(SPLITS, (flags.views or TRAINING_VIEWS, VALIDATION_VIEWS), strict=True)),
        image_size=data.image_size,
        resize=flags.resize or data.resize,
        batch_size=flags.batch_size or config.evaluate.batch_size,
        num_threads=flags.num_threads or data.num_threads,
        precision=flags.precision or config.encode.precision,
    )


def _describe(out: Path, manifest: Mapping) -> None:
    tokenizer = manifest["tokenizer"]
    weights = f"{tokenizer['path']}, step {tokenizer['step']}, {tokenizer['weights']} weights"
    print(f"{out}/ holds the codes of {manifest['data']['name']} by {weights}")
    for split, counts in manifest["splits"].items():
        views = ", ".join(manifest["data"]["splits"][split]["views"])
        print(
            f"  {split}: {counts['images']:,} images ({views}), {counts['num_tokens']:,} tokens; {counts['used']:,} of "
            f"{manifest['codebook_size']:,} codes used, perplexity {counts['perplexity']:.0f}, "
            f"entropy {counts['entropy']:.3f} nats"
        )
    if COMPARED in manifest:  # caches of earlier versions were not checked
        print(f"  {_comparison(manifest)}")
        print(f"look at {out}/{SHEET}: stored crops, each above what its codes decode to")
    preset = "openmoji32" if manifest["preprocessing"]["image_size"] < 128 else "imagenet256_B"
    fields = f"--config=configs/autoregressive.py:{preset} --config.token_cache={shlex.quote(str(out))}"
    print(f"next: python -m ibq_jax train {fields} --workdir=runs/ar")


def _describe_mixed(out: Path, manifest: Mapping) -> None:
    tokenizer, counts = manifest["tokenizer"], manifest["counts"]
    weights = f"{tokenizer['path']}, step {tokenizer['step']}, {tokenizer['weights']} weights"
    print(f"{out}/ holds the codes of {manifest['images']['source']} by {weights}")
    print(
        f"  {counts['images']:,} images in {len(manifest['shapes'])} shapes, {counts['num_tokens']:,} tokens; "
        f"{counts['used']:,} of {manifest['codebook_size']:,} codes used, perplexity {counts['perplexity']:.0f}, "
        f"entropy {counts['entropy']:.3f} nats"
    )
    print(
        f"  {counts['own_size']:,} images have their own size; the others changed their aspect ratio by at most "
        f"{counts['aspect_change']:.1%} (--max-shapes)"
    )
    if manifest["texts"]:
        print(f"  texts: {', '.join(manifest['texts'])}")
    if counts["skipped"]:
        print(f"  skipped {counts['skipped']:,} images, listed in {out}/images/*.json:")
        for line in manifest["skipped"]:
            print(f"    {line}")
    if COMPARED in manifest:  # caches of earlier versions were not checked
        print(f"  {_comparison(manifest)}")
        print(f"look at {out}/{SHEET}: images, each above what its codes decode to")


def _comparison(manifest: Mapping) -> str:
    """Returns a sentence on the share of sampled codes that differ from full float32."""
    sampled, differing = (manifest[COMPARED][name] for name in ("sampled_codes", "differing_codes"))
    if not differing:
        return f"0 of {sampled:,} sampled codes differ from full float32"
    words = f"{differing:,} of {sampled:,} sampled codes ({differing / sampled:.2%}) differ from full float32"
    if manifest["precision"] == "float32":  # they were encoded in batches of another size
        return f"{words} in other batches: rounding decides between codes at nearly the same distance"
    return f"{words}; --precision=float32 gives none"


def _views(text: str) -> tuple[str, ...]:
    """argparse type: names of crops, separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        if name not in VIEWS:
            raise ArgumentTypeError(f"there is no view {name!r}; the views are {', '.join(VIEWS)}")
    return names


def _two_splits(text: str) -> tuple[str, ...]:
    """argparse type: two splits of the data set, separated by a comma."""
    names = tuple(text.split(","))
    if len(names) != len(SPLITS) or not all(names):
        raise ArgumentTypeError(f"{text!r} is not two splits separated by a comma, such as train,validation")
    return names


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "tokenize",
        "Stores the codes that a tokenizer gives images in a token cache: of a data set's images, cropped to squares, "
        "to train a generator on; or of a folder's or tar shards' images at their own sizes, with their texts.",
        examples=[
            "--run=runs/quickstart/tokenizer --out=runs/codes",
            "--run=runs/imagenet --out=runs/codes --views=ten_crop --resize=282",
            "--run=runs/imagenet --out=runs/photos --data=photos --splits='train[:90%],train[90%:]'",
            "--run=runs/pruned --out=runs/compact --renumber=runs/codes",
            "--run=runs/emu35 --out=runs/web --images='shards/*.tar' --min-pixels=65536 --max-pixels=1048576",
        ],
        notes="The same command continues an interrupted cache. Several processes may share the work.",
    )
    add, own = parser.add_argument, "Default: the tokenizer's config."
    add(
        "--run",
        "--tokenizer",
        required=True,
        type=as_path,
        metavar="RUN",
        help="Folder of a tokenizer's run, or one of its checkpoints.",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="Folder of the token cache.")
    add(
        "--views",
        type=_views,
        metavar="NAMES",
        help=f"Crops of each training image to store, of {', '.join(VIEWS)}; of a validation image, the centre. "
        "Default: centre,flip.",
    )
    add("--resize", type=positive, metavar="N", help=f"Pixels of the shorter side before cropping. {own}")
    add("--data", metavar="NAME", help=f"Name of the data set. {own}")
    add("--data-dir", metavar="DIR", help=f"Folder that holds all data sets. {own}")
    add("--splits", type=_two_splits, metavar="A,B", help=f"Splits to train on and to validate on. {own}")
    add("--weights", choices=("ema", "raw"), default="ema", help="Averaged (ema) or raw weights. Default: ema.")
    add(
        "--renumber",
        type=Path,
        metavar="DIR",
        help="Token cache of the same images by the tokenizer that convert --prune made --run from: its codes get "
        "their new numbers, instead of encoding the images again. Default: encode the images.",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="Precision of all products that decide a code; all but float32 are faster on some machines and change "
        "some codes. Default: the config's encode.precision.",
    )
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help="Images encoded at once on all devices of a process. Default: the config's evaluate.batch_size.",
    )
    add(
        "--num-threads",
        "--threads",
        type=positive,
        metavar="N",
        help="Threads that decode images in each process. Default: the config's data.num_threads.",
    )
    add("--overwrite", action="store_true", help="Replace the token cache if it exists.")
    _add_mixed_flags(parser)
    add_format_flags(parser, required=False)
    return parser


def _add_mixed_flags(parser: Parser) -> None:
    add = parser.add_argument_group("images of mixed sizes").add_argument
    add(
        "--images",
        metavar="DIR_OR_'*.tar'",
        help="Folder of images, or pattern of tar shards in quotes, instead of a data set; each image keeps its size, "
        "and the texts that share its name (.txt, .json, .cls ...) are stored with its codes. Default: a data set.",
    )
    add(
        "--min-pixels",
        type=positive,
        metavar="N",
        help=f"Area in pixels to which smaller images are enlarged. Default: {MIN_PIXELS}.",
    )
    add(
        "--max-pixels",
        type=positive,
        metavar="N",
        help=f"Area in pixels to which larger images are reduced. Default: {MAX_PIXELS}.",
    )
    add(
        "--max-shapes",
        type=positive,
        metavar="N",
        help="Most shapes, rows by columns of codes, each of which compiles a program; if the images have more sizes, "
        f"some are stretched to the nearest shape. Default: {MAX_SHAPES}.",
    )
    add(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="Most tokens encoded at once on all devices of a process, but at least one image a device. Default: those "
        "of evaluate.batch_size images of data.image_size.",
    )
