"""`train`: a config and a work folder in, a trained run out."""

from argparse import ArgumentTypeError

from ibq_jax.base.config import PREFIX, load_config
from ibq_jax.base.files import as_path
from ibq_jax.commands.arguments import Parser
from ibq_jax.training.train import train

NEXT = {  # what to run after a stage
    "tokenizer": "evaluate --run={0} --pictures={0}/reconstructions.png",
    "autoregressive": "sample --run={0} --out={0}/samples.png",
}


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "train".

    Raises:
        UsageError: wrong flags, or a config that cannot be trained.
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
    train(config, flags.workdir, flags.profile)
    print(f"wrote {flags.workdir}/ (checkpoints, metrics.jsonl, events for TensorBoard)")
    print(f"next: python -m ibq_jax {NEXT[config.stage].format(flags.workdir)}")
    if flags.profile:
        print(f"the trace: tensorboard --logdir={flags.workdir}/profile (pip install tensorboard xprof)")


def parser() -> Parser:
    """Returns the command's argument parser."""
    parser = Parser(
        "train",
        "Trains a config, or continues the run that the work folder holds.",
        notes=f"Fields of the config are overridden with {PREFIX}NAME=VALUE, such as {PREFIX}codebook.size=8192.",
    )
    parser.add_argument("--config", required=True, help="FILE.py:PRESET, such as configs/tokenizer.py:openmoji64")
    parser.add_argument(
        "--workdir", required=True, type=as_path, help="folder of the run, here or gs://, made when it is not there"
    )
    parser.add_argument(
        "--profile",
        type=_steps,
        default=range(0),
        metavar="STEP:COUNT",
        help="write a trace of COUNT steps from STEP on",
    )
    return parser


def _steps(text: str) -> range:
    """argparse type: STEP:COUNT."""
    first, _, steps = text.partition(":")
    if not (first.isdecimal() and steps.isdecimal() and int(first) and int(steps)):
        raise ArgumentTypeError(f"{text!r} is not STEP:COUNT, such as 100:5")
    return range(int(first), int(first) + int(steps))
