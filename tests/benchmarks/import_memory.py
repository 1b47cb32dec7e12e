"""Imports a made-up generator of a published size and prints what memory that took.

    python tests/benchmarks/import_memory.py --size XXL

The file (random numbers, under the published names) and the run are written to a temporary folder, each as large as the
parameters are in float32. Peak memory is the importing process's largest resident set, interpreter and JAX included.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from ibq_jax.interop import generator_names

SIZES = {"B": 16, "L": 20, "XL": 24, "XXL": 30}  # layers, and heads of 64 channels


def made_up(layers: int) -> dict[str, torch.Tensor]:
    published = {"vocab_size": 16384, "block_size": 256, "n_layer": layers, "n_head": layers, "n_embd": 64 * layers}
    shapes = generator_names.published_shapes(generator_names.build(published))
    generator = torch.Generator().manual_seed(0)
    return {generator_names.PREFIX + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="XXL")
    parser.add_argument("--form", choices=("ckpt", "legacy", "safetensors"), default="ckpt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"weights.{'ckpt' if arguments.form == 'legacy' else arguments.form}"
        tensors = made_up(SIZES[arguments.size])
        largest = max(tensor.nbytes for tensor in tensors.values())
        if arguments.form == "safetensors":
            save_file(tensors, file)
        else:
            torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=arguments.form == "ckpt")
        del tensors
        command = [sys.executable, "-m", "ibq_jax", "convert", f"--in={file}", f"--out={Path(folder) / 'run'}"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        size = file.stat().st_size
    print(
        f"{arguments.size} as {arguments.form}: file {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, "
        f"{(peak - largest) / size:.2f} times the file plus the largest tensor ({largest / 1e6:.0f} MB), "
        f"{seconds:.0f} s on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
