"""Makes lpips_nets.npz: LPIPS of image pairs by lpips 0.1.4, with made-up trunks and its trained heads (version 0.1).

    pip install torch==2.13.0 scipy tqdm && pip install --no-deps torchvision==0.28.0 lpips==0.1.4

Trunk weights are drawn from the tensors' names in torchvision (`released.stand_ins`).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import golden_script, released

golden_script.allow_torchvision_without_cuda()
import lpips  # noqa: E402
import torchvision  # noqa: E402

TRUNKS = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}


def make(committed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs both networks on the pairs, in float32 and in float64."""
    arrays = {name: committed[name] for name in ("in0", "in1")}
    for net in TRUNKS:
        listing = list_tensors(net)
        tensors = released.stand_ins(listing)
        model = load(net, tensors)
        arrays |= {f"{net}_{name}": array for name, array in run(model, arrays["in0"], arrays["in1"]).items()}
        arrays[f"{net}_trunk_json"] = listing
        arrays[f"{net}_trunk_sums"], arrays[f"{net}_trunk_crc32"] = golden_script.checksums(tensors)
        arrays |= {f"{net}_lin{i}": lin.model[-1].weight.detach().numpy().ravel() for i, lin in enumerate(model.lins)}
        arrays |= {name: getattr(model.scaling_layer, name).numpy().ravel() for name in ("shift", "scale")}
        value = run(load(net, tensors).double(), arrays["in0"], arrays["in1"])["value"]
        arrays[f"{net}_value_f64"] = value
    return arrays


def list_tensors(net: str) -> np.ndarray:
    """Returns the names, shapes and types of the trunk's tensors in torchvision as JSON."""
    tensors = TRUNKS[net](weights=None).features.state_dict()
    listing = [[f"features.{name}", list(x.shape), "float32"] for name, x in tensors.items()]
    return np.array(json.dumps(sorted(listing)))


def load(net: str, tensors: dict[str, np.ndarray]) -> lpips.LPIPS:
    """Returns the package's LPIPS with this trunk; its slices keep torchvision's layer numbers."""
    model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for name, parameter in model.net.named_parameters():
        parameter.data = torch.from_numpy(tensors[f"features.{name.partition('.')[2]}"])
    return model


@torch.no_grad()
def run(model: lpips.LPIPS, in0: np.ndarray, in1: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the distances, each tap's contribution, and the mean of each tap of `in0`."""
    dtype = model.scaling_layer.shift.dtype
    x, y = (torch.from_numpy(u8).permute(0, 3, 1, 2).contiguous().to(dtype).div(127.5).sub(1) for u8 in (in0, in1))
    value, per_layer = model(x, y, retPerLayer=True)
    taps = model.net(model.scaling_layer(x))
    found = {
        "value": value.reshape(-1),
        "per_layer": torch.stack([layer.reshape(-1) for layer in per_layer], 1),
        "tap_mean": torch.stack([tap.mean((1, 2, 3)) for tap in taps], 1),
    }
    return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    golden_script.main("lpips_nets", make, __doc__)
