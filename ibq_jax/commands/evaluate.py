"""python -m ibq_jax evaluate: measures a tokenizer's reconstructions, a generator's likelihood, or samples."""

from argparse import Namespace
from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.commands.arguments import Parser, count, output_file, positive
from ibq_jax.evaluate.evaluate_run import evaluate_likelihood, evaluate_under_protocols, perplexity_by_row
from ibq_jax.evaluate.evaluate_samples import evaluate_generator_samples, evaluate_samples
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.evaluate.records import print_record, print_table, save_record, save_records

ALL = "all"  # in place of a protocol's name: every one of them

WEIGHT_FILES = {  # kind of feature net: how its file is called in the help
    "inception": "pytorch-fid's Inception-v3, for FID, sFID, Inception Score, precision and recall",
    "vgg16": "torchvision's VGG16, for LPIPS",
    "alexnet": "torchvision's AlexNet, for LPIPS",
}


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "evaluate".

    Raises:
        UsageError: wrong flags, no run or nothing saved in it, its data, token cache or samples are not on this
            machine, or a file of weights or of references is not what it should be.
    """
    flags = parser().parse_args(argv)
    if (flags.run is None) == (flags.samples is None):
        raise UsageError("give either --run=RUN or --samples=FILE.npz with --reference=FILE.npz")
    if flags.samples is not None:
        _refuse_all(flags, "samples")
        _evaluate_samples(flags)
        return
    saved = SavedRun.find(flags.run)
    _refuse_other_stage(flags, saved.config.stage)
    if saved.config.stage == "tokenizer":
        _evaluate_tokenizer(flags, saved.workdir)
    elif flags.num is not None:
        _evaluate_generator_samples(flags, saved.workdir)
    else:
        _evaluate_likelihood(flags, saved.workdir)


def _refuse_other_stage(flags: Namespace, stage: str) -> None:
    """Raises UsageError for flags that do not apply to a run of this stage."""
    if stage == "tokenizer":
        if flags.token_cache:
            raise UsageError(f"--token-cache is for generators; {flags.run} is a tokenizer, which reads images: --data")
        if flags.num is not None or flags.reference is not None:
            raise UsageError(f"--num and --reference are for samples of a generator; {flags.run} is a tokenizer")
        return
    if flags.reconstructions:
        raise UsageError(
            f"--reconstructions is for tokenizers; for a generator: sample --run={flags.run} --out=FILE.png"
        )
    _refuse_all(flags, "a generator")
    if flags.data or flags.data_dir:
        raise UsageError(
            f"--data is for tokenizers; {flags.run} is a generator, which reads a token cache: --token-cache"
        )


def _refuse_all(flags: Namespace, measured: str) -> None:
    """Raises UsageError if all protocols are asked for, which only reconstructions can follow."""
    if flags.protocol == ALL:
        raise UsageError(f"--protocol={ALL} is for tokenizers, not for {measured}: name one of {', '.join(PROTOCOLS)}")


def _evaluate_tokenizer(flags: Namespace, workdir: Path) -> None:
    records = evaluate_under_protocols(
        flags.run,
        PROTOCOLS if flags.protocol == ALL else (flags.protocol or "clean",),
        weights=flags.weights,
        num_images=flags.num_images,
        data={"name": flags.data, "dir": flags.data_dir, "validation_split": flags.split},
        weight_files=_weight_files(flags),
        reconstructions=flags.reconstructions,
        columns=flags.columns,
        rows=flags.rows,
    )
    if flags.protocol == ALL:
        print_table(records)
        save_records(records, workdir, flags.json)
    else:
        print_record(records[0])
        save_record(records[0], workdir, flags.json)
    if flags.reconstructions:
        print(f"wrote {flags.reconstructions} (originals above, reconstructions below)")


def _evaluate_likelihood(flags: Namespace, workdir: Path) -> None:
    record = evaluate_likelihood(
        flags.run,
        weights=flags.weights,
        num_images=flags.num_images,
        token_cache=flags.token_cache,
        split=flags.split or "validation",
    )
    print_record(record)
    rows = " ".join(f"{perplexity:.0f}" for perplexity in perplexity_by_row(record))
    print(f"  perplexity by rows of codes, top to bottom: {rows}")
    save_record(record, workdir, flags.json)


def _evaluate_generator_samples(flags: Namespace, workdir: Path) -> None:
    record = evaluate_generator_samples(
        flags.run,
        flags.num,
        weights=flags.weights,
        reference=flags.reference,
        protocol=flags.protocol or "adm",
        batch_size=flags.batch_size,
        weight_files=_weight_files(flags),
    )
    _report_samples(record, workdir, flags.json)


def _evaluate_samples(flags: Namespace) -> None:
    if flags.reference is None:
        raise UsageError("--samples needs --reference=FILE.npz: images, or their statistics (mu and sigma)")
    record = evaluate_samples(
        flags.samples,
        flags.reference,
        protocol=flags.protocol or "adm",
        batch_size=flags.batch_size,
        weight_files=_weight_files(flags),
    )
    _report_samples(record, None, flags.json)


def _report_samples(record: dict, workdir: Path | None, file: Path | None) -> None:
    print_record(record)
    print(f"  against {record['reference']}")
    save_record(record, workdir, file)


def _weight_files(flags: Namespace) -> dict[str, str]:
    return {kind: getattr(flags, kind) for kind in WEIGHT_FILES}


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "evaluate",
        "Measures a tokenizer's reconstructions, a generator's likelihood or its samples, and saves the numbers in the "
        "run.",
        examples=[
            "--run=runs/tokenizer --reconstructions=reconstructions.png",
            "--run=runs/tokenizer --protocol=seed_voken --vgg16=vgg16-397923af.pth",
            "--run=runs/tokenizer --protocol=all",
            "--run=runs/generator",
            "--run=runs/generator --num=50000 --reference=VIRTUAL_imagenet256_labeled.npz",
            "--samples=samples.npz --reference=statistics.npz",
        ],
        notes="docs/evaluation.md explains the protocols and where the feature nets' files come from.",
    )
    add = parser.add_argument
    add(
        "--run",
        type=as_path,
        metavar="RUN",
        help="The run to evaluate: its folder, or one of its checkpoints. Default: none, with --samples.",
    )
    add("--weights", choices=("ema", "raw"), default="ema", help="Averaged (ema) or last (raw) weights. Default: ema.")
    add(
        "--protocol",
        choices=(*PROTOCOLS, ALL),
        help="How to measure; all: a tokenizer under every protocol, in one table. Default: clean; for samples: adm.",
    )
    add(
        "--num-images",
        "--examples",
        type=count,
        default=0,
        metavar="N",
        help="Measure N images, evenly spaced in the split. Default: 0, all of them.",
    )
    add("--split", metavar="NAME", help="Split of the data to measure. Default: the config's validation split.")
    add("--data", metavar="NAME", help="Data set on which to evaluate a tokenizer. Default: the config's.")
    add("--data-dir", metavar="DIR", help="Folder of the data sets. Default: the config's.")
    add(
        "--token-cache",
        "--codes",
        default="",
        metavar="DIR",
        help="Token cache on which to evaluate a generator. Default: the config's.",
    )
    add("--num", type=positive, metavar="N", help="Draw N samples from a generator and evaluate those. Default: none.")
    add(
        "--samples",
        type=Path,
        metavar="NPZ",
        help="Evaluate the samples in this file, which `sample --num` wrote. Default: none.",
    )
    add(
        "--reference",
        type=Path,
        metavar="NPZ",
        help="Images or statistics to compare samples with. Default: the images that the run was trained on.",
    )
    add("--batch-size", type=positive, default=32, metavar="N", help="Samples per batch, all devices. Default: 32.")
    for kind, description in WEIGHT_FILES.items():
        add(
            f"--{kind}",
            default="",
            metavar="FILE",
            help=f"Weights of {description}. Default: ${'IBQ_' + kind.upper()}, or the file in ~/.cache/ibq_jax.",
        )
    add(
        "--reconstructions",
        "--pictures",
        type=output_file,
        metavar="PNG",
        help="Write originals with their reconstructions below to this file. Default: no file.",
    )
    add("--columns", type=positive, default=8, metavar="N", help="Images per row of that PNG. Default: 8.")
    add("--rows", type=positive, default=2, metavar="N", help="Rows of originals in that PNG. Default: 2.")
    add("--json", type=output_file, metavar="FILE", help="Write the numbers with their protocol here too. Default: no.")
    return parser
