"""python -m ibq_jax train: trains a config in a folder, or continues the run there."""

import functools
from argparse import ArgumentTypeError

from ibq_jax.base.config import PREFIX, load_config
from ibq_jax.base.files import as_path
from ibq_jax.commands.arguments import Parser
from ibq_jax.interop.load import load_weights
from ibq_jax.training.train import train

NEXT = {  # the command to run after a stage
    "tokenizer": "evaluate --run={0} --reconstructions={0}/reconstructions.png",
    "autoregressive": "sample --run={0} --out={0}/samples.png",
    "joint": "sample --run={0}/generator --out={0}/samples.png",
}


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "train".

    Raises:
        UsageError: wrong flags, or a field, a file or the folder is wrong.
        TrainingStopped: a loss was not finite, or the codebook collapsed.
        Interrupted: SIGTERM or Ctrl-C arrived; the step was saved.
    """
    command_line = parser()
    flags, rest = command_line.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith(PREFIX)]
    for argument in rest:
        if argument not in overrides:
            command_line.error(
                f"unknown argument {argument}; fields of the config are overridden with {PREFIX}NAME=VALUE"
            )
    config = load_config(flags.config, overrides)
    initial = functools.partial(load_weights, flags.init, config.stage) if flags.init else None
    train(config, flags.workdir, flags.profile, initial=initial)
    print(f"wrote {flags.workdir}/ (checkpoints, metrics.jsonl, events for TensorBoard)")
    print(f"next: python -m ibq_jax {NEXT[config.stage].format(flags.workdir)}")
    if flags.profile:
        print(f"the trace: tensorboard --logdir={flags.workdir}/profile (pip install tensorboard xprof)")


def parser() -> Parser:
    """Returns the command's argument parser."""
    parser = Parser(
        "train",
        "Trains a tokenizer, a generator or both from a config, or continues the run that the folder holds.",
        examples=[
            "--config=configs/tokenizer.py:openmoji64 --workdir=runs/tokenizer",
            "--config=configs/tokenizer.py:imagenet256_16384 --workdir=gs://bucket/tokenizer\n"
            "--config.data.dir=gs://bucket/data --config.codebook.size=8192",
            "--config=configs/autoregressive.py:openmoji64 --workdir=runs/generator --config.token_cache=runs/codes",
            "--config=configs/joint.py:openmoji32 --workdir=runs/joint",
            "--config=configs/tokenizer.py:openmoji64 --workdir=runs/tokenizer --config.train.steps=20000",
            "--config=configs/tokenizer.py:finetune_decoder --workdir=runs/decoder\n"
            "--init=hf://TencentARC/IBQ-Tokenizer-16384",
        ],
        notes=f"{PREFIX}NAME=VALUE overrides a field of the config, such as {PREFIX}codebook.size=8192.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:PRESET",
        help="Config file and preset, such as configs/tokenizer.py:openmoji64.",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=as_path,
        metavar="DIR",
        help="Folder of the run, local or gs://, created if it does not exist.",
    )
    parser.add_argument(
        "--init",
        metavar="FILE_OR_RUN",
        help="Start a new run from the weights of this run, file of weights, or hf://OWNER/NAME, the averaged ones if "
        "there are any. A run that is continued ignores it. Default: random weights.",
    )
    parser.add_argument(
        "--profile",
        type=_steps,
        default=range(0),
        metavar="STEP:COUNT",
        help="Write a trace of COUNT steps, from step STEP on, to the run's folder. Default: no trace.",
    )
    return parser


def _steps(text: str) -> range:
    """Parses STEP:COUNT, as an argparse type."""
    first, _, steps = text.partition(":")
    if not (first.isdecimal() and steps.isdecimal() and int(first) and int(steps)):
        raise ArgumentTypeError(f"{text!r} is not STEP:COUNT, such as 100:5")
    return range(int(first), int(first) + int(steps))
