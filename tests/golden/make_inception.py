"""Makes inception.npz: features and logits of pytorch-fid 0.3.0's Inception-v3 with made-up weights.

    pip install torch==2.13.0 scipy pillow && pip install --no-deps torchvision==0.28.0 pytorch-fid==0.3.0

The package builds its network itself; only its download is replaced by weights that are drawn from the tensors' names
(`released.stand_ins`).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import golden_script, released

golden_script.allow_torchvision_without_cuda()
from pytorch_fid import inception as pytorch_fid  # noqa: E402

BLOCKS = ("feat64", "feat192", "feat768", "pool2048")


def make(committed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs the network on both groups of images, in float32 and in float64."""
    listing = list_tensors()
    tensors = released.stand_ins(listing)
    arrays = {"state_dict_json": listing}
    arrays["weight_sums"], arrays["weight_crc32"] = golden_script.checksums(tensors)
    state_dict = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    pytorch_fid.load_state_dict_from_url = lambda url, progress: state_dict
    for dtype in (torch.float32, torch.float64):
        network = pytorch_fid.InceptionV3([0, 1, 2, 3]).to(dtype).eval()
        weight, bias = (state_dict[f"fc.{part}"].to(dtype) for part in ("weight", "bias"))
        for group in ("a", "b"):
            found = run(network, committed[f"{group}_images"], dtype)
            found["logits1008"] = found["pool2048"] @ weight.T.numpy() + bias.numpy()
            if dtype == torch.float64:
                found = {f"{name}_f64": found[name] for name in ("pool2048", "logits1008")}
            else:
                arrays[f"{group}_images"] = committed[f"{group}_images"]
            arrays |= {f"{group}_{name}": array for name, array in found.items()}
    return arrays


def list_tensors() -> np.ndarray:
    """Returns the names, shapes and types of the network's tensors as JSON."""
    pytorch_fid.load_state_dict_from_url = lambda url, progress: {}
    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda self, state_dict: None
    try:
        tensors = pytorch_fid.fid_inception_v3().state_dict()
    finally:
        torch.nn.Module.load_state_dict = load
    listing = [[name, list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in sorted(tensors.items())]
    return np.array(json.dumps(listing))


@torch.no_grad()
def run(network: pytorch_fid.InceptionV3, images: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns pooled outputs of every block, and probes: one row of the input, corners, the center, Mixed_6d."""
    probes = {}
    network.blocks[0].register_forward_pre_hook(lambda _, x: probes.update(input=x[0]))
    mixed_6d = network.blocks[2][6]
    hook = mixed_6d.register_forward_hook(lambda _, inputs, output: probes.update(mixed_6d=output))
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(dtype) / 255
    blocks = network(x)
    hook.remove()
    found = {name: block.mean((2, 3)) for name, block in zip(BLOCKS, blocks, strict=True)}
    found |= {f"block{i}_corner": blocks[i][:, :, 0, 0] for i in range(3)}
    found |= {"block2_center": blocks[2][:, :, 8, 8], "mixed6d_first7": probes["mixed_6d"][:, :7]}
    found["netinput_row7"] = probes["input"][:, :, 7]
    return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    golden_script.main("inception", make, __doc__)
