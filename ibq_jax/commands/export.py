"""python -m ibq_jax export: converts a token cache to files that other projects train on."""

from argparse import Namespace
from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.commands.arguments import Parser, count
from ibq_jax.data.code_export import USED, check_states_shape, export_codes, open_codes, read_map
from ibq_jax.data.code_files import FORMATS
from ibq_jax.data.code_layouts import LAYOUTS, CodeLayout, find_layout


def main(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: the words after "export".

    Raises:
        UsageError: wrong flags, no complete token cache, an --out of other settings, or a map that does not fit.
    """
    flags = parser().parse_args(argv)
    export(flags.codes, flags.out, flags)


def export(cache: Path, out: Path, flags: Namespace) -> None:
    """Converts `cache` to files in `out` as the flags of `add_format_flags` say, and describes them."""
    layout = check_format_flags(flags)
    codes = open_codes(cache)
    settings = export_codes(codes, out, flags.format, layout, flags.compact)
    images = sum(part.images for part in codes.parts)
    print(f"{out}/ holds the codes of {images:,} images of {cache} as {flags.format}, in {len(codes.parts)} parts")
    if settings["compact"]:
        print(f"  {settings['codebook_size']:,} of {codes.codebook_size:,} codes, renumbered by {out}/old_to_new.npy")
    if flags.format == "megatron":
        print(f"  tokens are below {settings['vocab_size']:,}; settings.json has the layout")


def check_format_flags(flags: Namespace, mixed: bool = False) -> CodeLayout:
    """Returns the layout that the flags name, after all checks that need no token cache.

    Args:
        flags: those of `add_format_flags`.
        mixed: whether the images are known to be of mixed sizes.

    Raises:
        UsageError: the flags do not go together, or name a layout or a map that is none.
    """
    for name in ("layout", "offset"):
        if getattr(flags, name) is not None and flags.format != "megatron":
            raise UsageError(f"--{name} goes with --format=megatron")
    if flags.compact is not None and flags.format is None:
        raise UsageError(
            "--compact goes with --format; a token cache has compact codes by convert --prune and --renumber"
        )
    if flags.compact not in (None, USED):
        read_map(Path(flags.compact))
    layout = find_layout(flags.layout or "codes", flags.offset)
    if mixed and flags.format == "megatron":
        check_states_shape(layout)
    return layout


def add_format_flags(parser: Parser, required: bool) -> None:
    """Adds the flags that `export` and `tokenize` share."""
    add = parser.add_argument_group("files for other projects").add_argument
    default = "" if required else " Default: none."
    add(
        "--format",
        required=required,
        choices=tuple(FORMATS),
        help="Megatron's IndexedDataset, JSON lines as RAR's pretokenization writes them, or Parquet for Hugging Face "
        f"datasets.{default}",
    )
    add(
        "--layout",
        metavar="NAME",
        help=f"With --format=megatron: what stands around the codes, of {', '.join(LAYOUTS)}, or a file NAME.json with "
        "the token of each part. Default: codes, which is the codes alone.",
    )
    add(
        "--offset",
        type=count,
        metavar="N",
        help="With --format=megatron: the token of code 0, that is, the number of tokens before the codes. Default: "
        "the layout's.",
    )
    add(
        "--compact",
        metavar="FILE",
        help="Renumber the codes by a map such as old_to_new.npy of convert --prune, or, by the word "
        f"{USED!r}, those that occur in order. The map is written next to the files. Default: the tokenizer's numbers.",
    )


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "export",
        "Converts a token cache to files that other projects train on.",
        examples=[
            "--codes=runs/codes --format=jsonl --out=runs/jsonl",
            "--codes=runs/web --format=megatron --layout=emu35 --out=runs/megatron",
            "--codes=runs/web --format=parquet --compact=runs/pruned/old_to_new.npy --out=runs/parquet",
        ],
        notes="The same command continues an interrupted export. There is one file for each part of the cache.",
    )
    add = parser.add_argument
    add("--codes", required=True, type=Path, metavar="DIR", help="Folder of a token cache, made by tokenize.")
    add("--out", required=True, type=Path, metavar="DIR", help="Folder of the files.")
    add_format_flags(parser, required=True)
    return parser
