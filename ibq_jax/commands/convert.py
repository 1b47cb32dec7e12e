"""python -m ibq_jax convert: makes a run of another codebook size from a trained one, to train on from there."""

import copy
import shutil
from pathlib import Path

import numpy as np

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.commands.arguments import Parser, positive, share, underscored
from ibq_jax.commands.evaluations import validation_evaluator
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.run import restore_run
from ibq_jax.tokenizer.surgery import kept_map, split_map, with_codebook

INDEX_MAP = "index_map.npy"


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "convert".

    Raises:
        UsageError: wrong flags, no run, an --out that exists, or a size that the codebook cannot get.
    """
    flags = _parser().parse_args(underscored(argv))
    if flags.out.exists():
        raise UsageError(f"--out={flags.out} exists already; name a folder that does not")
    trainer, restored = restore_run(flags.input)
    codes = trainer.config.codebook.size
    if flags.prune:
        counts = validation_evaluator(trainer, examples=0).histogram(restored.state.ema)
        index_map = kept_map(counts, flags.multiple_of)
    else:
        index_map = split_map(codes, flags.codebook_size)
    config = copy.deepcopy(trainer.config).unlock()
    config.codebook.size = len(index_map)
    check_config(config.lock(), trainer.mesh)
    state = with_codebook(restored.state, index_map, flags.spread, config.seed)
    _write(flags.out, config, state, restored.metadata | {"config": config.to_dict()}, restored.step, index_map)
    print(f"wrote {flags.out}/: step {restored.step} with {len(index_map):,} codes instead of {codes:,}")
    print(f"      {flags.out}/{INDEX_MAP}: the code before of every code now, int32 [{len(index_map)}]")
    print(
        f"next: python -m ibq_jax train --config=... --config.codebook.size={len(index_map)} --workdir={flags.out}, "
        f"with the config of {flags.input} and train.steps over {restored.step}"
    )


def _write(out: Path, config, state, metadata: dict, step: int, index_map: np.ndarray) -> None:
    """All of the new run, or nothing."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_config(config, partial / "config.json")
        np.save(partial / INDEX_MAP, index_map)
        checkpoints = Checkpoints(partial / "checkpoints")
        checkpoints.save(step, state, metadata)
        checkpoints.close()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _parser() -> Parser:
    parser = Parser(prog="python -m ibq_jax convert", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "--in",
        dest="input",
        required=True,
        type=Path,
        metavar="RUN",
        help="folder of a tokenizer's run, or a checkpoint",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the new run")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--codebook_size", type=positive, metavar="N", help="split codes, until there are N")
    size.add_argument("--prune", action="store_true", help="drop the codes that the validation split does not use")
    parser.add_argument(
        "--multiple_of", type=positive, default=64, metavar="N", help="of which --prune keeps the size (default: 64)"
    )
    parser.add_argument(
        "--spread",
        type=share,
        default=0.02,
        help="how far children lie from their code, in root mean squares of the codebook (default: 0.02)",
    )
    return parser
