"""python -m ibq_jax sample: draws samples from a trained generator: a contact sheet, or a set to evaluate."""

from argparse import Namespace
from pathlib import Path

from ibq_jax.autoregressive.sample_codes import SCHEDULES
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path
from ibq_jax.commands.arguments import Parser, count, numbers, output_file, positive
from ibq_jax.evaluate.draw_samples import SampleSettings, draw_contact_sheet, draw_sample_set


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "sample".

    Raises:
        UsageError: wrong flags, no generator's run or nothing saved in it, its tokenizer is missing or another one, or
            labels, settings or an image are wrong.
    """
    flags = parser().parse_args(argv)
    if (flags.num is not None) != (flags.out.suffix == ".npz"):
        raise UsageError(f"--out={flags.out}: a set of --num=N samples is an .npz file, a contact sheet a .png")
    if flags.num is None:
        classes = draw_contact_sheet(flags.run, flags.out, flags.labels, flags.per_class, _settings(flags))
        print(f"wrote {flags.out}: {flags.per_class} samples of each of {classes} classes")
    elif draw_sample_set(flags.run, flags.out, flags.num, flags.labels, _settings(flags)):
        print(f"wrote {flags.out}: {flags.num:,} samples as arr_0, their labels as arr_1; settings next to it as .json")
        print(f"next: python -m ibq_jax evaluate --samples={flags.out} --reference=FILE.npz")
    else:
        print(f"{flags.out}: this process is done; the last one to finish joins the parts")


def _settings(flags: Namespace) -> SampleSettings:
    return SampleSettings(
        weights=flags.weights,
        seed=flags.seed,
        cfg_scale=flags.cfg_scale,
        cfg_schedule=flags.cfg_schedule,
        cfg_power=flags.cfg_power,
        cfg_interval=flags.cfg_interval,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        per_device_batch=flags.per_device_batch,
        tokenizer=flags.tokenizer,
        image=flags.image,
        keep_rows=flags.keep_rows,
    )


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "sample",
        "Draws samples from a trained generator: a contact sheet to look at, or with --num a set to evaluate.",
        examples=[
            "--run=runs/generator --labels=88,207,360 --out=samples.png",
            "--run=runs/generator --out=samples.png --cfg-scale=2.25 --temperature=1.1 --seed=1",
            "--run=runs/generator --num=50000 --out=samples.npz",
            "--run=runs/generator --image=cat.jpg --keep-rows=8 --labels=281 --out=completed.png",
        ],
        notes="The same command continues an interrupted set. Sample number i of a seed is always the same.",
    )
    add, own = parser.add_argument, "Default: the run's config."
    add(
        "--run",
        required=True,
        type=as_path,
        metavar="RUN",
        help="Folder of a generator's run, or one of its checkpoints.",
    )
    add("--out", required=True, type=output_file, metavar="FILE", help="File to write: a .png, or with --num an .npz.")
    add(
        "--labels",
        type=numbers(int),
        default=(),
        metavar="N,N,...",
        help="Classes to draw, such as 0,1,2. Default: all; in a contact sheet the first 10.",
    )
    add("--per-class", type=positive, default=8, metavar="N", help="Samples per class in a contact sheet. Default: 8.")
    add(
        "--num", type=positive, metavar="N", help="Draw a set of N samples, every class equally often. Default: no set."
    )
    add("--seed", type=count, default=0, metavar="N", help="Seed of the samples, 0 to 2^32 - 1. Default: 0.")
    add("--cfg-scale", type=float, metavar="X", help=f"Scale of classifier-free guidance; 1 turns it off. {own}")
    add(
        "--cfg-schedule",
        choices=SCHEDULES,
        default="constant",
        help="How guidance grows from 1 to its scale over the codes of an image. Default: constant, at full scale.",
    )
    add("--cfg-power", type=float, default=1.0, metavar="X", help="Exponent of the cosine schedule. Default: 1.0.")
    add(
        "--cfg-interval",
        type=numbers(float),
        default=(0.0, 1.0),
        metavar="A,B",
        help="Use guidance only between these fractions of an image's codes, such as 0.2,0.8. Default: 0,1.",
    )
    add("--temperature", type=float, metavar="X", help=f"Softmax temperature; 0 takes the most likely code. {own}")
    add("--top-k", type=count, metavar="N", help=f"Draw from the N most likely codes; 0 means all. {own}")
    add("--top-p", type=float, metavar="P", help=f"Draw from the most likely codes with total probability P. {own}")
    add(
        "--image", type=Path, metavar="FILE", help="Start every sample with this image's first rows. Default: no image."
    )
    add("--keep-rows", type=count, metavar="N", help="Rows of codes kept from --image. Default: the upper half.")
    add(
        "--per-device-batch",
        "--lane",
        type=count,
        default=0,
        metavar="N",
        help="Samples that each device draws at once. Default: 0, which is 4 on CPUs and 64 elsewhere.",
    )
    add("--weights", choices=("ema", "raw"), default="ema", help="Averaged (ema) or last (raw) weights. Default: ema.")
    add(
        "--tokenizer", default="", metavar="RUN", help="Run of the codes' tokenizer. Default: where it was at training."
    )
    return parser
