"""python -m ibq_jax tokenize: stores the codes that a tokenizer gives a data set's images, to train a generator on."""

import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ibq_jax.base.files import as_path, resolve
from ibq_jax.base.processes import barrier, joined
from ibq_jax.commands.arguments import Parser, positive
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.preprocess import VIEWS
from ibq_jax.data.token_cache import read_manifest
from ibq_jax.tokenizer.restore import restore_run
from ibq_jax.tokenizer.tokenize import Job, extract

SPLITS = ("train", "validation")  # as the cache calls them
VALIDATION_VIEWS = ("centre",)


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "tokenize".

    Raises:
        UsageError: wrong flags, no run or nothing saved in it, no such data set or split, an --out that is something
            else or a cache of other settings, or an image that cannot be decoded.
    """
    flags = parser().parse_args(argv)
    trainer, restored = restore_run(flags.tokenizer)
    params = restored.state.ema if flags.weights == "ema" else restored.state.params
    origin = {
        "path": str(resolve(flags.tokenizer)),
        "step": restored.step,
        "weights": flags.weights,
        "config": trainer.config.to_dict(),
    }
    manifest = extract(
        trainer.model,
        params,
        _job(flags, trainer.config),
        flags.out,
        origin,
        overwrite=flags.overwrite,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    barrier("tokenized")  # the last process to end its part completes the cache
    if joined():
        manifest = read_manifest(flags.out.resolve())
    if manifest is None:
        print(f"{flags.out}: this process is done; the last of the others to end completes the cache")
    else:
        _describe(flags.out, manifest)


def _job(flags: Namespace, config: ConfigDict) -> Job:
    """What the flags ask for; what they leave open is as in the tokenizer's config."""
    data = config.data
    name, data_dir = flags.data or data.name, flags.data_dir or data.dir
    splits = flags.splits or (data.train_split, data.validation_split)
    return Job(
        sources={split: open_split(name, data_dir, source) for split, source in zip(SPLITS, splits, strict=True)},
        views=dict(zip(SPLITS, (flags.views, VALIDATION_VIEWS), strict=True)),
        image_size=data.image_size,
        resize=flags.resize or data.resize,
        batch_size=flags.batch_size or config.evaluate.batch_size,
        threads=flags.threads or data.num_threads,
    )


def _describe(out: Path, manifest: Mapping) -> None:
    tokenizer, codes = manifest["tokenizer"], manifest["codes"]
    whose = f"{tokenizer['path']}, step {tokenizer['step']}, {tokenizer['weights']} weights"
    print(f"{out}/ holds the codes of {manifest['data']['name']} by {whose}")
    for split, counts in manifest["splits"].items():
        views = ", ".join(manifest["data"]["splits"][split]["views"])
        print(
            f"  {split}: {counts['images']:,} images ({views}), {counts['codes']:,} codes; {counts['used']:,} of "
            f"{codes:,} used, perplexity {counts['perplexity']:.0f}, entropy {counts['entropy']:.3f} nats"
        )
    print(f"next: python -m ibq_jax train {' '.join(_training_flags(out, manifest))} --workdir=runs/ar")


def _training_flags(out: Path, manifest: Mapping) -> Iterator[str]:
    """A small preset for small pictures and a large one for others, with what the codes leave no choice about."""
    preset = "openmoji32" if manifest["preprocessing"]["image_size"] < 128 else "imagenet256_B"
    yield f"--config=configs/autoregressive.py:{preset}"
    yield f"--config.token_cache={shlex.quote(str(out))}"
    yield f"--config.model.vocab_size={manifest['codes']}"
    yield f"--config.model.grid={','.join(map(str, manifest['grid']))}"
    yield f"--config.model.num_classes={len(manifest['data']['class_names'])}"


def _views(text: str) -> tuple[str, ...]:
    """argparse type: names of views."""
    names = tuple(text.split(","))
    for name in names:
        if name not in VIEWS:
            raise ArgumentTypeError(f"there is no view {name!r}; the views are {', '.join(VIEWS)}")
    return names


def _two_splits(text: str) -> tuple[str, ...]:
    """argparse type: the source's names of the two splits."""
    names = tuple(text.split(","))
    if len(names) != len(SPLITS) or not all(names):
        raise ArgumentTypeError(f"{text!r} is not the names of two splits: one to train on, one to validate on")
    return names


def parser() -> Parser:
    parser = Parser("tokenize", __doc__.partition(": ")[2])
    parser.add_argument(
        "--tokenizer", required=True, type=as_path, metavar="RUN", help="folder of a tokenizer's run, or a checkpoint"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the token cache")
    parser.add_argument(
        "--views",
        type=_views,
        default=("centre", "flip"),
        metavar="NAMES",
        help=f"crops of a training image, of {', '.join(VIEWS)} (default: centre,flip); validation has the centre",
    )
    parser.add_argument("--resize", type=positive, metavar="N", help="pixels of the shorter side before cropping")
    parser.add_argument("--data", metavar="NAME", help="the data set")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data sets are")
    parser.add_argument("--splits", type=_two_splits, metavar="A,B", help="to train on, to validate on")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default), or the last ones")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="crops at once on all devices of a process")
    parser.add_argument("--threads", type=positive, metavar="N", help="that decode images")
    parser.add_argument("--overwrite", action="store_true", help="remove the cache that is there, and make it anew")
    parser.epilog = "What is not given is as in the tokenizer's config; the batch size, as its evaluate.batch_size."
    return parser
