"""What `convert --verify` prints: where PyTorch and JAX part, and by how much."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.data.openmoji import openmoji
from ibq_jax.data.preprocess import centre_crop, decode_image, resize_shorter_side
from ibq_jax.data.sources import IMAGE_SUFFIXES
from ibq_jax.interop import generator_names
from ibq_jax.interop.load import is_weights_file, load_generator, load_tokenizer, stage_of
from ibq_jax.interop.recognize import GENERATOR
from ibq_jax.interop.to_file import export_run, relabel_file
from ibq_jax.pretrained.tensor_files import write_tensors

PICTURES, SEQUENCES, SHOWN = 4, 2, 5


def print_verification(source: Path, written: Path | None, flags: Namespace) -> None:
    """Compares `written`, or where nothing was written what would be, with `source`.

    Raises UsageError without PyTorch, Failed where the two compute different things.
    """
    try:
        from ibq_jax.interop import verify
    except ImportError as error:
        raise UsageError("--verify needs PyTorch: pip install -r requirements-torch.txt") from error
    use_ema = flags.weights != "raw"
    with _file(source, written, flags.weights) as file:
        if stage_of(file) == GENERATOR:
            model, params, _ = load_generator(source, use_ema)
            codes, labels = _codes(model)
            tensors = generator_names.generator_to_torch(params, "")
            report = verify.verify_generator(model, params, tensors, file, codes, labels)
            of_codes = "codes drawn greedily from the upper half of random ones"
        else:
            model, params = load_tokenizer(source, use_ema)
            report = verify.verify_tokenizer(model, params, file, _images(flags.images, model.resolution))
            of_codes = f"codes of {PICTURES} pictures"
    print(f"{report.agreeing:,} of {report.codes:,} {of_codes} are the same in PyTorch and in JAX")
    print(f"{len(report.differences):,} tensors compared; the largest differences, of the tensor's largest magnitude:")
    for difference in sorted(report.differences, key=lambda d: -d.relative)[:5]:
        print(
            f"  {difference.name}: {difference.relative:.1e} ({difference.largest:.1e} of {difference.magnitude:.3g})"
        )
    first = report.first_beyond
    if first is not None:
        raise Failed(
            f"PyTorch computes something else: {first.name} is the first to differ by more than {verify.TOLERANCE:g} "
            f"of its largest magnitude, by {first.relative:.1e}"
        )


@contextmanager
def _file(source: Path, written: Path | None, weights: str) -> Iterator[Path]:
    """A file that says what it is."""
    if written is not None:
        yield written
        return
    tensors, about = relabel_file(source) if is_weights_file(source) else export_run(source, weights)
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder) / "weights.safetensors", tensors, about)
        del tensors
        yield Path(folder) / "weights.safetensors"


def _images(folder: Path | None, side: int) -> np.ndarray:
    """float32 [B, side, side, 3] in [-1, 1]: the first of a folder, or embedded ones."""
    if folder is None:
        encoded = (example.read() for example in openmoji(size=side).examples())
    else:
        files = sorted(path for path in folder.glob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"--images={folder}: no images there")
        encoded = (path.read_bytes() for path in files)
    images = [centre_crop(resize_shorter_side(decode_image(image), side), side) for image in islice(encoded, PICTURES)]
    return (np.stack(images).astype(np.float32) / 127.5 - 1.0).astype(np.float32)


def _codes(model) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.vocab_size, (SEQUENCES, *model.grid), np.int32)
    return codes, rng.integers(0, max(model.num_classes, 1), SEQUENCES, np.int32)
