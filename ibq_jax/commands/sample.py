"""python -m ibq_jax sample: draws pictures from a trained generator: a sheet to look at, or a set to evaluate."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.restore import find_tokenizer, restore_run
from ibq_jax.autoregressive.sample import SCHEDULES, Guidance, check_labels
from ibq_jax.autoregressive.sample_images import ImageSampler
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path, resolve
from ibq_jax.base.processes import barrier, joined
from ibq_jax.base.sharding import make_mesh
from ibq_jax.commands.arguments import Parser, count, numbers, output_file, positive
from ibq_jax.data.preprocess import UnreadableImage, centre_crop, decode_image, resize_shorter_side
from ibq_jax.evaluate.contact_sheet import contact_sheet
from ibq_jax.evaluate.sample_set import write_sample_set

CLASSES_SHOWN = 10


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "sample".

    Raises:
        UsageError: wrong flags, no generator's run or nothing saved in it, its tokenizer is not where it was or is
            another, or labels, settings or an image out of range.
    """
    flags = parser().parse_args(argv)
    if (flags.num is not None) != (flags.out.suffix == ".npz"):
        raise UsageError(f"--out={flags.out}: a set of --num=N pictures is an .npz file, a sheet to look at a .png")
    trainer, restored, manifest = restore_run(flags.run)
    settings = _settings(flags, trainer.config)
    tokenizer = find_tokenizer(flags.tokenizer, manifest, needed=True)
    classes = tuple(manifest["data"]["class_names"])
    labels = check_labels(trainer.model, np.asarray(flags.labels or range(max(len(classes), 1))))
    params = jax.device_get(restored.state.weights(flags.weights))
    mesh = make_mesh({"data": -1}, jax.local_devices())
    sampler = ImageSampler(trainer.model, params, tokenizer, mesh, settings, flags.lane)
    prefix = _prefix(sampler, flags, manifest["preprocessing"])

    def draw(labels: np.ndarray, pictures: np.ndarray | None = None) -> np.ndarray:
        return sampler(labels, pictures, np.repeat(prefix, len(labels), axis=0))

    if flags.num is None:
        if jax.process_index() == 0:  # whose devices suffice for a sheet
            _write_sheet(draw, labels if flags.labels else labels[:CLASSES_SHOWN], classes or ("",), flags)
        return
    described = _described(flags, settings) | {"step": restored.step, "tokenizer": manifest["tokenizer"]["fingerprint"]}
    complete = write_sample_set(
        flags.out,
        np.resize(labels, flags.num),
        draw,
        described,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    barrier("drawn")  # the last process to end its part joins all of them
    if complete or joined():
        print(f"wrote {flags.out}: {flags.num:,} pictures as arr_0, their labels as arr_1; settings beside it as .json")
    else:
        print(f"{flags.out}: this process is done; the last of the others to end joins the parts")


def _settings(flags: Namespace, config: ConfigDict) -> dict:
    """Of the drawing; what the flags leave open is as in the run's config."""
    sample = config.sample

    def chosen(name: str):
        value = getattr(flags, name)
        return getattr(sample, name) if value is None else value

    return {
        "guidance": Guidance(chosen("cfg_scale"), flags.cfg_schedule, flags.cfg_power, flags.cfg_interval),
        "logit_filter": LogitFilter(chosen("top_k"), chosen("top_p")),
        "temperature": chosen("temperature"),
        "seed": flags.seed,
    }


def _described(flags: Namespace, settings: dict) -> dict:
    """What a set's pictures depend on, for its .json."""
    guidance, logit_filter = settings["guidance"], settings["logit_filter"]
    return {
        "run": str(resolve(flags.run)),
        "weights": flags.weights,
        "seed": settings["seed"],
        "temperature": settings["temperature"],
        "top_k": logit_filter.top_k,
        "top_p": logit_filter.top_p,
        "cfg_scale": guidance.scale,
        "cfg_schedule": guidance.schedule,
        "cfg_power": guidance.power,
        "cfg_interval": list(guidance.interval),
        "labels": list(flags.labels) or "all classes in turn",
        "lane": flags.lane,
        "image": str(flags.image or ""),
        "keep_rows": flags.keep_rows,
    }


def _prefix(sampler: ImageSampler, flags: Namespace, preprocessing: dict) -> np.ndarray:
    """The codes [1, P] that all pictures begin with: the first rows of an image's, or none."""
    if flags.image is None:
        return np.zeros((1, 0), np.int32)
    try:
        image = decode_image(flags.image.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"--image={flags.image} does not exist") from None
    except UnreadableImage as error:
        raise UsageError(f"--image={flags.image} cannot be read: {error}") from error
    image = centre_crop(resize_shorter_side(image, preprocessing["resize"]), preprocessing["image_size"])
    codes = sampler.codes_of(image)
    kept = len(codes) // 2 if flags.keep_rows is None else flags.keep_rows
    if kept >= len(codes):
        raise UsageError(f"--keep_rows={kept}: an image has {len(codes)} rows of codes, of which one at least is drawn")
    return codes[:kept].reshape(1, -1)


def _write_sheet(draw, labels: np.ndarray, classes: Sequence[str], flags: Namespace) -> None:
    images = draw(np.repeat(labels, flags.per_class))
    images = images.reshape(len(labels), flags.per_class, *images.shape[1:])
    Image.fromarray(contact_sheet(images, [classes[label] for label in labels])).save(flags.out, "PNG")
    print(f"wrote {flags.out}: {flags.per_class} pictures of each of {len(labels)} classes")


def parser() -> Parser:
    parser = Parser("sample", __doc__.partition(": ")[2])
    parser.add_argument("--run", required=True, type=as_path, help="folder of a generator's run, or a checkpoint")
    parser.add_argument("--out", required=True, type=output_file, metavar="FILE", help="a .png, or with --num an .npz")
    parser.add_argument("--labels", type=numbers(int), default=(), help="classes, such as 0,1,2 (default: all)")
    parser.add_argument("--per-class", type=positive, default=8, help="pictures of a class in the sheet (default: 8)")
    parser.add_argument("--num", type=positive, help="size of the set, every class as often as any other")
    parser.add_argument("--seed", type=count, default=0, help="pictures 0, 1, ... of a seed are always the same")
    own = "(default: the run's config)"
    parser.add_argument("--cfg-scale", type=float, help=f"classifier-free guidance; 1 is none {own}")
    parser.add_argument("--cfg-schedule", choices=SCHEDULES, default="constant", help="over a picture's codes")
    parser.add_argument("--cfg-power", type=float, default=1.0, help="of the cosine schedule")
    parser.add_argument("--cfg-interval", type=numbers(float), default=(0.0, 1.0), help="where it is on: 0.2,0.8")
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest code {own}")
    parser.add_argument("--top-k", type=count, help=f"draw from the likeliest codes only; 0: all {own}")
    parser.add_argument("--top-p", type=float, help=f"draw from those that reach this probability {own}")
    parser.add_argument("--image", type=Path, help="begin every picture as this one, and draw the rest")
    parser.add_argument("--keep-rows", type=count, help="rows of codes kept of --image (default: the upper half)")
    parser.add_argument("--lane", type=count, default=0, help="pictures a device draws at once (CPUs: 4, others: 64)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default), or the last")
    parser.add_argument("--tokenizer", default="", help="the codes' tokenizer, if it is not where it was")
    return parser
