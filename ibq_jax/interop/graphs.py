"""Writes a tokenizer as graphs that need no code of its networks: ONNX, and PyTorch's exported programs.

Two graphs, for batches and sides of any size: encode, float32 [B, 3, H, W] in [-1, 1] -> int64 [B, h, w], and decode,
int64 [B, h, w] -> float32 [B, 3, H, W], not clamped. Encode holds the logits of all tokens at once, [B h w, K].
Imports PyTorch, which is an optional dependency; ONNX needs the packages onnx and onnxscript too.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import atomic_folder
from ibq_jax.interop.torch_model import Tokenizer, own_tensors

SIDE = 3  # codes, of the example that is traced: no side of it is 1, which would count as fixed
ENCODE, DECODE = "encode", "decode"


class Encode(nn.Module):
    """Images -> codes."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        z, quantize = self.tokenizer.latent(images), self.tokenizer.quantize
        logits = z.permute(0, 2, 3, 1) @ quantize.vectors(quantize.embedding.weight).T
        return logits.argmax(dim=-1)


class Decode(nn.Module):
    """Codes -> images."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode(codes)


def write_graphs(folder: Path, tensors: Mapping[str, np.ndarray], architecture: Mapping, suffix: str) -> list[str]:
    """Writes a tokenizer's two graphs into a new folder.

    Args:
        folder: encode and decode come here; large ONNX weights lie next to them, in *.onnx.data.
        tensors: under the published names, as `to_file.export` returns them; averages are taken if there are any.
        architecture: in the format of the published configurations.
        suffix: "onnx" or "pt2", which `torch.export.load` reads.

    Returns:
        the names of the files.

    Raises:
        UsageError: the folder exists, it is no tokenizer, or a package is missing.
    """
    if "ddconfig" not in architecture:
        raise UsageError("graphs are written of tokenizers; a generator samples in a loop, which torch_model.py has")
    tokenizer = Tokenizer.of(architecture)
    arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    tokenizer.load_state_dict(own_tensors(tokenizer, arrays))
    tokenizer.requires_grad_(False).eval()
    factor = 2 ** (len(architecture["ddconfig"]["ch_mult"]) - 1)
    h, w, batch = torch.export.Dim("h", min=2), torch.export.Dim("w", min=2), torch.export.Dim("batch")
    images, codes = torch.zeros(2, 3, SIDE * factor, SIDE * factor), torch.zeros(2, SIDE, SIDE, dtype=torch.int64)
    graphs = {
        ENCODE: (Encode(tokenizer), images, {0: batch, 2: factor * h, 3: factor * w}),
        DECODE: (Decode(tokenizer), codes, {0: batch, 1: h, 2: w}),
    }
    with atomic_folder(folder) as partial:
        for name, (module, example, free) in graphs.items():
            with torch.no_grad():
                program = torch.export.export(module, (example,), dynamic_shapes=(free,))
            WRITERS[suffix](program, partial / f"{name}.{suffix}")
        return sorted(path.name for path in partial.iterdir())


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--graphs=onnx needs onnx and onnxscript: pip install -r requirements-onnx.txt") from error
    source, result = ("images", "codes") if path.stem == ENCODE else ("codes", "images")
    logger = logging.getLogger("torch.onnx")  # warns of every package that could be installed besides
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about PyTorch's own use of what it replaces
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[source], output_names=[result]
            )
            assert exported is not None  # it is with dynamo=True
            exported.save(path)
    finally:
        logger.setLevel(before)


WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path], object]] = {
    "onnx": _write_onnx,
    "pt2": torch.export.save,
}
