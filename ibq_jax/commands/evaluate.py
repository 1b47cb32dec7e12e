"""python -m ibq_jax evaluate: measures a tokenizer, a generator's likelihood, or generated pictures."""

import copy
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ibq_jax.autoregressive.restore import check_fit
from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.commands.arguments import Parser, count, output_file, positive
from ibq_jax.commands.generation import evaluate_drawn, evaluate_set
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.evaluate import likelihood
from ibq_jax.evaluate.feature_nets import KINDS, few_images, find_feature_nets
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.evaluate.records import record, save, show
from ibq_jax.evaluate.validation import likelihood_evaluator, validation_evaluator
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer

SMALLEST_SHOWN = 96  # pixels of an image's side in a picture; smaller ones are enlarged a whole number of times


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "evaluate".

    Raises:
        UsageError: wrong flags, no run or nothing saved in it, its data, codes or pictures are not on this machine, or
            a file of weights or of references is not what it should be.
    """
    flags = parser().parse_args(argv)
    if (flags.run is None) == (flags.samples is None):
        raise UsageError("give either --run=RUN or --samples=FILE.npz with --reference=FILE.npz")
    if flags.samples is not None:
        evaluate_set(flags)
        return
    saved = SavedRun.find(flags.run)
    generator = saved.config.stage == "autoregressive"
    _refuse(flags, generator)
    if not generator:
        _evaluate_tokenizer(flags, saved.workdir)
    elif flags.num is not None:
        evaluate_drawn(flags, saved)
    else:
        _evaluate_generator(flags, saved.workdir)


def _refuse(flags: Namespace, generator: bool) -> None:
    """Flags of the other stage."""
    if generator and flags.pictures:
        raise UsageError(
            f"--pictures is of a tokenizer's run; for a generator's: sample --run={flags.run} --out=FILE.png"
        )
    if generator and (flags.data or flags.data_dir):
        raise UsageError(f"--data is of a tokenizer's run; {flags.run} is a generator's, which reads --codes")
    if not generator and flags.codes:
        raise UsageError(f"--codes is of a generator's run; {flags.run} is a tokenizer's, which reads images: --data")
    if not generator and (flags.num is not None or flags.reference is not None):
        raise UsageError(f"--num and --reference are of generated pictures; {flags.run} is a tokenizer's run")


def _evaluate_tokenizer(flags: Namespace, workdir: Path) -> None:
    trainer, restored = restore_tokenizer(flags.run)
    trainer = replace(trainer, config=_with_data(trainer.config, flags))
    data, protocol = trainer.config.data, PROTOCOLS[flags.protocol or "clean"]
    evaluator = validation_evaluator(trainer, flags.examples, protocol, find_feature_nets(KINDS, vars(flags)))
    params = restored.state.weights(flags.weights)
    metrics = dict(evaluator(params))
    images = int(metrics["images"])
    available = len(open_split(data.name, data.dir, data.validation_split))
    found = record(
        stage="tokenizer",
        run=flags.run,
        step=restored.step,
        weights=flags.weights,
        split=f"{data.name}/{data.validation_split}",
        protocol=protocol,
        marks=[*protocol.marks(images, available, data.image_size), *few_images(metrics, images)],
        metrics=metrics,
        codes=trainer.config.codebook.size,
    )
    show(found)
    save(found, workdir, f"{protocol.name}-{found['split']}", flags.json)
    if flags.pictures:
        picture = evaluator.picture(params, flags.columns, flags.rows)
        if jax.process_index() == 0:
            _write_picture(picture, data.image_size, flags.pictures)
        print(f"wrote {flags.pictures} (originals above, reconstructions below)")


def _with_data(config: ConfigDict, flags: Namespace) -> ConfigDict:
    asked = {"name": flags.data, "dir": flags.data_dir, "validation_split": flags.split}
    config = copy.deepcopy(config)
    config.data.update({field: value for field, value in asked.items() if value is not None})
    return config


def _evaluate_generator(flags: Namespace, workdir: Path) -> None:
    trainer, restored, _ = restore_generator(flags.run)
    params = restored.state.weights(flags.weights)
    codes, split = flags.codes or trainer.config.token_cache, flags.split or "validation"
    if not codes:
        raise UsageError(f"{flags.run} was imported, without codes: give --codes=FOLDER, which tokenize wrote")
    source = open_token_cache(codes, split)
    check_fit(trainer.config, source)
    measured = likelihood_evaluator(trainer, source, flags.examples)(params)
    available = len(source)
    found = record(
        stage="autoregressive",
        run=flags.run,
        step=restored.step,
        weights=flags.weights,
        split=f"{source.manifest['data']['name']}/{split}",
        protocol={"name": "likelihood", "description": likelihood.PROTOCOL, "images": 0},
        marks=[f"not comparable: {measured.images:,} images of {available:,}"] if measured.images != available else [],
        metrics={
            "loss": measured.loss,
            "perplexity": measured.perplexity,
            "order_0": source.manifest["splits"][split]["entropy"],
            "uniform": math.log(trainer.config.model.vocab_size),
            "images": measured.images,
        },
        codes=trainer.config.model.vocab_size,
        perplexity_by_position=measured.perplexity_by_position.tolist(),
    )
    show(found)
    rows = np.exp(measured.by_position.mean(axis=1))
    print(f"  perplexity by rows of the picture, top to bottom: {' '.join(f'{row:.0f}' for row in rows)}")
    save(found, workdir, f"likelihood-{found['split']}", flags.json)


def _write_picture(picture: np.ndarray, image_size: int, path: Path) -> None:
    image, factor = Image.fromarray(picture), -(-SMALLEST_SHOWN // image_size)
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path, "PNG")


def parser() -> Parser:
    parser = Parser("evaluate", __doc__.partition(": ")[2])
    parser.add_argument("--run", type=as_path, help="folder of a run, or one of its checkpoints")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default), or the last ones")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), help="how (default: clean; of an .npz: adm)")
    parser.add_argument("--examples", type=count, default=0, help="images of the split (default: 0, all)")
    parser.add_argument("--split", metavar="NAME", help="of the data (default: the config's to validate on)")
    parser.add_argument("--data", metavar="NAME", help="of a tokenizer: the data set (default: the config's)")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data sets are (default: the config's)")
    parser.add_argument("--codes", metavar="DIR", help="of a generator: the token cache (default: the config's)")
    parser.add_argument("--num", type=positive, metavar="N", help="of a generator: draw N pictures, and judge those")
    parser.add_argument("--samples", type=Path, metavar="NPZ", help="pictures to judge, as sample --num writes them")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="NPZ",
        help="pictures or statistics (default: a run's own originals)",
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures of --samples at once (default: 32)")
    for kind, what in (
        ("inception", "pytorch-fid's Inception-v3"),
        ("vgg16", "torchvision's VGG16"),
        ("alexnet", "torchvision's AlexNet"),
    ):
        parser.add_argument(f"--{kind}", default="", metavar="FILE", help=f"{what}, if not where it is looked for")
    parser.add_argument("--pictures", type=output_file, metavar="PNG", help="write originals beside reconstructions")
    parser.add_argument("--columns", type=positive, default=8, help="images in a row of that PNG (default: 8)")
    parser.add_argument("--rows", type=positive, default=2, help="rows of originals in that PNG (default: 2)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers with their protocol")
    return parser
