"""python -m ibq_jax detokenize: decodes stored codes, of a token cache or of files for other projects, to images."""

import itertools
from pathlib import Path

from ibq_jax.base.files import as_path
from ibq_jax.commands.arguments import Parser, count, positive
from ibq_jax.data.code_layouts import LAYOUTS, find_layout
from ibq_jax.data.stored_codes import open_stored
from ibq_jax.tokenizer.detokenize import detokenize
from ibq_jax.tokenizer.model import downsampling
from ibq_jax.tokenizer.restore import restore_run
from ibq_jax.tokenizer.tokenize import fingerprint


def main(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: the words after "detokenize".

    Raises:
        UsageError: wrong flags, no run, no codes or damaged ones, or codes that the tokenizer does not have.
    """
    flags = parser().parse_args(argv)
    layout = (
        None if flags.layout is None and flags.offset is None else find_layout(flags.layout or "codes", flags.offset)
    )
    stored = open_stored(flags.codes, layout, flags.compact)
    trainer, restored = restore_run(flags.run)
    config, params = trainer.config, restored.state.weights(flags.weights)
    model = trainer.model.for_encoding(config.encode.precision)
    if stored.fingerprint not in (None, fingerprint(model, params)):
        print(f"note: {flags.codes} has the codes of another tokenizer, other weights or another precision")
    tokens = config.evaluate.batch_size * (config.data.image_size // downsampling(config)) ** 2
    images = itertools.islice(stored.of(model.codebook_size), flags.num or None)
    number = detokenize(model, params, images, flags.out, tokens)
    print(f"{flags.out}/ holds {number:,} images, decoded from {flags.codes}")


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "detokenize",
        "Decodes stored codes to PNG files, one per image (of a token cache with several crops, one per crop).",
        examples=[
            "--run=runs/emu35 --codes=runs/web --num=100 --out=decoded",
            "--run=runs/emu35 --codes=runs/megatron/train-00000-of-00012.idx --out=decoded",
            "--run=runs/emu35 --codes=others/part_0.bin --layout=apertus15 --out=decoded",
        ],
    )
    add = parser.add_argument
    add(
        "--run",
        required=True,
        type=as_path,
        metavar="RUN",
        help="Folder of a tokenizer's run, or one of its checkpoints.",
    )
    add(
        "--codes",
        required=True,
        type=Path,
        metavar="PATH",
        help="Folder of a token cache, folder that export wrote, or a .jsonl, .parquet, .idx or .bin file.",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="Folder of the PNG files.")
    add("--num", type=positive, metavar="N", help="Decode the first N images. Default: all.")
    add("--weights", choices=("ema", "raw"), default="ema", help="Averaged (ema) or raw weights. Default: ema.")
    add(
        "--layout",
        metavar="NAME",
        help=f"What stands around the codes in a .bin file, of {', '.join(LAYOUTS)}, or a file NAME.json. Default: as "
        "settings.json next to the file says, else codes.",
    )
    add(
        "--offset",
        type=count,
        metavar="N",
        help="The number of tokens before code 0 in a .bin file. Default: the layout's.",
    )
    add(
        "--compact",
        type=Path,
        metavar="FILE",
        help="Map by which the codes were renumbered (old_to_new.npy). Default: as next to the file.",
    )
    return parser
