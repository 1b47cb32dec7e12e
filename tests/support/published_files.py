"""Weight files as the authors' training leaves them, of the golden networks."""

from pathlib import Path

import numpy as np
import pytest

from support import released

torch = pytest.importorskip("torch")

GENERATOR_FIELDS = ("--config.model.grid=4,4", "--config.dtype=float32")


def state_dict_of(name: str) -> dict[str, np.ndarray]:
    arrays = released.load(name)
    return {key.removeprefix("sd/"): np.array(array) for key, array in arrays.items() if key.startswith("sd/")}


def save_as_released(path: Path, state_dict: dict[str, np.ndarray], legacy: bool = False) -> Path:
    """As the authors' training leaves it: other things lie beside the state dict."""
    content = {
        "state_dict": {name: torch.from_numpy(array) for name, array in state_dict.items()},
        "epoch": 3,
        "optimizer_states": [{"state": {0: torch.zeros(5)}}],
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
