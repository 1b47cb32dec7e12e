"""python -m ibq_jax convert: weights from PyTorch and to PyTorch, and runs of another codebook size."""

import copy
from argparse import Namespace
from pathlib import Path

import numpy as np

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import PREFIX, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import atomic_folder
from ibq_jax.commands.arguments import Parser, positive, share
from ibq_jax.commands.verification import print_verification
from ibq_jax.evaluate.validation import validation_evaluator
from ibq_jax.interop.from_file import import_file
from ibq_jax.interop.hub import download_if_hub
from ibq_jax.interop.hub_layout import write_hub_folder
from ibq_jax.interop.load import is_weights_file
from ibq_jax.interop.to_file import WEIGHTS, export_run, relabel_file
from ibq_jax.pretrained.tensor_files import PICKLED, write_tensors
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.quantizers import check_trained_rows
from ibq_jax.tokenizer.resize_codebook import grow_index_map, prune_index_map, resize_codebook
from ibq_jax.tokenizer.restore import restore_whole_run

INDEX_MAP = "index_map.npy"
FILES = (".safetensors", *PICKLED)


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "convert".

    Raises:
        UsageError: wrong flags; no such run, file or repository; one that is not whole, or of other tensors than a
            tokenizer or a generator has; an --out that exists; a size that the codebook cannot get.
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
    if flags.out is not None and flags.out.exists():
        raise UsageError(f"--out={flags.out} exists already; name one that does not")
    source = download_if_hub(flags.input)
    from_file = is_weights_file(source)
    if flags.codebook_size or flags.prune:
        _resize(flags, source)
    elif flags.out is not None and (flags.hub or flags.out.suffix in FILES):
        _write_weights(flags, source, from_file)
    elif flags.out is not None and from_file:
        words = import_file(source, flags.out, flags.config, overrides, flags.tokenizer)
        print(f"wrote {flags.out}/: {source} holds {words}")
    elif flags.out is not None:
        raise UsageError(
            f"--out={flags.out}: a run becomes a file ({', '.join(FILES)}), with --hub a folder for the hub, with "
            "--codebook-size or --prune another run"
        )
    if flags.verify:
        written = flags.out if flags.out is not None and flags.out.suffix in FILES else None
        print_verification(source, written, flags)


def _write_weights(flags: Namespace, source: Path, from_file: bool) -> None:
    tensors, about = relabel_file(source) if from_file else export_run(source, flags.weights)
    if flags.hub:
        write_hub_folder(flags.out, tensors, about)
        print(f"wrote {flags.out}/: model.safetensors, config.json, README.md (the model card) and torch_model.py")
    else:
        write_tensors(flags.out, tensors, about)
        size = sum(tensor.nbytes for tensor in tensors.values())
        print(f"wrote {flags.out}: {about['description']}; {len(tensors):,} tensors, {size / 1e6:,.1f} MB")


def _resize(flags: Namespace, source: Path) -> None:
    """A run of another codebook size."""
    trainer, restored = restore_whole_run(source)
    check_trained_rows(trainer.model.quantizer, "a codebook of another size")
    codes = trainer.config.codebook.size
    if flags.prune:
        counts = validation_evaluator(trainer, examples=0).histogram(restored.state.ema)
        index_map = prune_index_map(counts, flags.multiple_of)
    else:
        index_map = grow_index_map(codes, flags.codebook_size)
    config = copy.deepcopy(trainer.config).unlock()
    config.codebook.size = len(index_map)
    check_config(config.lock(), trainer.mesh)
    state = resize_codebook(restored.state, index_map, flags.spread, config.seed)
    with atomic_folder(flags.out) as partial:
        save_config(config, partial / "config.json")
        np.save(partial / INDEX_MAP, index_map)
        checkpoints = Checkpoints(partial / "checkpoints")
        checkpoints.save(restored.step, state, restored.metadata | {"config": config.to_dict()})
        checkpoints.close()
    print(f"wrote {flags.out}/: step {restored.step} with {len(index_map):,} codes instead of {codes:,}")
    print(f"      {flags.out}/{INDEX_MAP}: the code before of every code now, int32 [{len(index_map)}]")
    print(
        f"next: python -m ibq_jax train --config=... --config.codebook.size={len(index_map)} --workdir={flags.out}, "
        f"with the config of {flags.input} and train.steps over {restored.step}"
    )


def parser() -> Parser:
    parser = Parser(
        "convert",
        "Weights from PyTorch and to PyTorch, and runs of another codebook size.",
        notes=f"A file becomes a run, a run a file. Fields of a new run are overridden with {PREFIX}NAME=VALUE.",
    )
    parser.add_argument(
        "--in",
        dest="input",
        required=True,
        metavar="PLACE",
        help="a run's folder, a checkpoint, a file of weights (.ckpt .pt .pth .safetensors), or hf://OWNER/NAME",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="a folder for a run, or a .ckpt, .pt or .safetensors")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="all", help="of a tokenizer's run: all a published file has (default)"
    )
    parser.add_argument("--hub", action="store_true", help="write the folder --out as the Hugging Face hub has it")
    parser.add_argument("--verify", action="store_true", help="compare PyTorch with JAX, layer by layer")
    parser.add_argument("--images", type=Path, metavar="DIR", help="of --verify; default: some of the embedded ones")
    parser.add_argument("--config", default="", metavar="FILE:PRESET", help="of a new run, what a file does not tell")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="RUN", help="of a new generator's run, what decodes its codes"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--codebook-size", type=positive, metavar="N", help="split codes, until there are N")
    size.add_argument("--prune", action="store_true", help="drop the codes that the validation split does not use")
    parser.add_argument(
        "--multiple-of", type=positive, default=64, metavar="N", help="of which --prune keeps the size (default: 64)"
    )
    parser.add_argument(
        "--spread",
        type=share,
        default=0.02,
        help="how far children lie from their code, in root mean squares of the codebook (default: 0.02)",
    )
    return parser
