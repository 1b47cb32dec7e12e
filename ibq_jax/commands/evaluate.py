"""python -m ibq_jax evaluate: measures a trained tokenizer's reconstructions, or a generator's likelihood."""

import copy
import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ibq_jax.autoregressive.run import check_fit
from ibq_jax.autoregressive.run import restore_run as restore_generator
from ibq_jax.base.errors import UsageError
from ibq_jax.base.run import SavedRun
from ibq_jax.commands.arguments import Parser, count, output_file, positive, underscored
from ibq_jax.commands.evaluations import likelihood_evaluator, validation_evaluator
from ibq_jax.data.codes import open_codes
from ibq_jax.evaluate import likelihood, reconstruction
from ibq_jax.tokenizer.run import restore_run as restore_tokenizer

REPORT = """{split}: {images:.0f} images, step {step}, {weights} weights
({protocol})
  PSNR        {psnr:.2f} dB
  SSIM        {ssim:.4f}
  L1          {l1:.4f}
  usage       {usage:.1%} of {codes} codes
  perplexity  {perplexity:.0f}"""

LIKELIHOOD_REPORT = """{split}: {images} pictures, step {step}, {weights} weights
({protocol})
  loss                       {loss:.4f} nats a code, perplexity {perplexity:.1f}
  order 0, the codes alone   {order_0:.4f} nats
  uniform, log of {codes:<8}   {uniform:.4f} nats
  perplexity by rows of the picture, top to bottom: {rows}"""

SMALLEST_SHOWN = 96  # pixels of an image's side in a picture; smaller ones are enlarged a whole number of times


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "evaluate".

    Raises:
        UsageError: wrong flags, no run or nothing saved in it, or its data are not on this machine.
    """
    flags = _parser().parse_args(underscored(argv))
    if SavedRun.find(flags.run).config.stage == "autoregressive":
        numbers = _evaluate_generator(flags)
    else:
        numbers = _evaluate_tokenizer(flags)
    if flags.json:
        flags.json.write_text(json.dumps(numbers, indent=2) + "\n")
        print(f"wrote {flags.json}")


def _evaluate_tokenizer(flags: Namespace) -> dict:
    if flags.codes:
        raise UsageError(f"--codes is of a generator's run; {flags.run} is a tokenizer's, which reads images: --data")
    trainer, restored = restore_tokenizer(flags.run)
    trainer = replace(trainer, config=_with_data(trainer.config, flags))
    params = restored.state.ema if flags.weights == "ema" else restored.state.params
    evaluator = validation_evaluator(trainer, flags.examples)
    numbers = {
        "run": str(flags.run),
        "step": restored.step,
        "weights": flags.weights,
        "split": f"{trainer.config.data.name}/{trainer.config.data.validation_split}",
        "protocol": reconstruction.PROTOCOL,
        "codes": trainer.config.codebook.size,
        **dict(evaluator(params)),
    }
    print(REPORT.format_map(numbers))
    if flags.pictures:
        _write_picture(
            evaluator.picture(params, flags.columns, flags.rows), trainer.config.data.image_size, flags.pictures
        )
        print(f"wrote {flags.pictures} (originals above, reconstructions below)")
    return numbers


def _with_data(config: ConfigDict, flags: Namespace) -> ConfigDict:
    asked = {"name": flags.data, "dir": flags.data_dir, "validation_split": flags.split}
    config = copy.deepcopy(config)
    config.data.update({field: value for field, value in asked.items() if value is not None})
    return config


def _evaluate_generator(flags: Namespace) -> dict:
    if flags.pictures:
        raise UsageError(
            f"--pictures is of a tokenizer's run; for a generator's: sample --run={flags.run} --out=FILE.png"
        )
    if flags.data or flags.data_dir:
        raise UsageError(f"--data is of a tokenizer's run; {flags.run} is a generator's, which reads --codes")
    trainer, restored, _ = restore_generator(flags.run)
    params = restored.state.averaged if flags.weights == "ema" else restored.state.params
    codes, split = flags.codes or trainer.config.codes, flags.split or "validation"
    if not codes:
        raise UsageError(f"{flags.run} was imported, without codes: give --codes=FOLDER, which tokenize wrote")
    source = open_codes(codes, split)
    check_fit(trainer.config, source)
    manifest = source.manifest
    measured = likelihood_evaluator(trainer, source, flags.examples)(params)
    numbers = {
        "run": str(flags.run),
        "step": restored.step,
        "weights": flags.weights,
        "split": f"{manifest['data']['name']}/{split}",
        "protocol": likelihood.PROTOCOL,
        "codes": trainer.config.model.vocabulary,
        "images": measured.images,
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "order_0": manifest["splits"][split]["entropy"],
        "uniform": math.log(trainer.config.model.vocabulary),
        "perplexity_by_position": measured.perplexity_by_position.tolist(),
    }
    rows = np.exp(measured.by_position.mean(axis=1))
    print(LIKELIHOOD_REPORT.format_map(numbers | {"rows": " ".join(f"{row:.0f}" for row in rows)}))
    return numbers


def _write_picture(picture: np.ndarray, image_size: int, path: Path) -> None:
    image, factor = Image.fromarray(picture), -(-SMALLEST_SHOWN // image_size)
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path, "PNG")


def _parser() -> Parser:
    parser = Parser(prog="python -m ibq_jax evaluate", description=__doc__.partition(": ")[2])
    parser.add_argument("--run", required=True, type=Path, help="folder of a run, or one of its checkpoints")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default), or the last ones")
    parser.add_argument("--examples", type=count, default=0, help="images of the split (default: 0, all)")
    parser.add_argument("--split", metavar="NAME", help="of the data (default: the config's to validate on)")
    parser.add_argument("--data", metavar="NAME", help="of a tokenizer: the data set (default: the config's)")
    parser.add_argument("--data_dir", metavar="DIR", help="where the data sets are (default: the config's)")
    parser.add_argument("--codes", metavar="DIR", help="of a generator: the token cache (default: the config's)")
    parser.add_argument("--pictures", type=output_file, metavar="PNG", help="write originals beside reconstructions")
    parser.add_argument("--columns", type=positive, default=8, help="images in a row of that PNG (default: 8)")
    parser.add_argument("--rows", type=positive, default=2, help="rows of originals in that PNG (default: 2)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers with their protocol")
    return parser
