"""Published results of the authors' models, shown next to a run of the same sizes.

The figures are those of arXiv 2412.02692 (reconstruction, class-conditional generation) and of the model cards of the
published weights; docs/recipe.md has them with the commands that measure the same. An epoch is 1,281,167 images.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TOKENIZER = {
    "stage": "tokenizer",
    "quantizer.name": "ibq",
    "model.resolution": 256,
    "model.channels": 128,
    "quantizer.l2_normalize": False,
    "codebook.dim": 256,
}
MEASURED_BY = {
    "tokenizer": "on ImageNet's 50,000 validation images; evaluate --protocol=seed_voken measures the same",
    "autoregressive": "on 50,000 samples with this preset's guidance and temperature; sample --num=50000 and evaluate "
    "--samples measure the same",
}
FORMATS = {"usage": "{:.0%}", "PSNR": "{:.2f} dB"}  # any other number as it was published
CURVES = {"usage": "codebook/usage"}  # results that training logs, too: their scalars


@dataclass(frozen=True)
class Published:
    """The results of one published model.

    Attributes:
        sizes: the fields of a config that has the model's sizes, by their dotted names.
        trained_on: the data set.
        steps: of training.
        batch_size: images a step.
        results: what was published, by the name of the metric.
    """

    sizes: Mapping[str, object]
    trained_on: str
    steps: int
    batch_size: int
    results: Mapping[str, float]

    def words(self) -> str:
        """Returns a sentence with all figures and their source."""
        results = ", ".join(f"{name} {FORMATS.get(name, '{}').format(value)}" for name, value in self.results.items())
        return (
            f"Published for these sizes: {results}, after {self.steps:,} steps of {self.batch_size} images of "
            f"{self.trained_on} (arXiv 2412.02692), {MEASURED_BY[str(self.sizes['stage'])]}."
        )

    @property
    def levels(self) -> dict[str, dict[str, float]]:
        """The levels to draw into plots: by scalar, by label."""
        label = f"published, after {self.steps:,} steps"
        return {CURVES[name]: {label: value} for name, value in self.results.items() if name in CURVES}


def _tokenizer(codes: int, steps: int, trained_on: str = "ImageNet", **results: float) -> Published:
    return Published(TOKENIZER | {"codebook.size": codes}, trained_on, steps, 256, results)


def _generator(layers: int, steps: int, fid: float, inception_score: float) -> Published:
    sizes = {
        "stage": "autoregressive",
        "model.num_layers": layers,
        "model.embed_dim": 64 * layers,
        "model.vocab_size": 16_384,
        "model.num_classes": 1_000,
    }
    return Published(sizes, "ImageNet", steps, 768, {"FID": fid, "IS": inception_score})


PUBLISHED = (
    _tokenizer(1_024, 1_651_320, rFID=2.24, LPIPS=0.2580, usage=0.99),
    _tokenizer(8_192, 1_401_120, rFID=1.87, LPIPS=0.2437, usage=0.98),
    _tokenizer(16_384, 1_651_320, rFID=1.37, LPIPS=0.2235, usage=0.96),
    _tokenizer(262_144, 1_651_320, rFID=1.00, LPIPS=0.2030, usage=0.84),
    _tokenizer(16_384, 1_500_000, "larger data sets", rFID=2.06, PSNR=22.01, SSIM=0.61),
    _tokenizer(262_144, 1_500_000, "larger data sets", rFID=1.53, PSNR=22.69, SSIM=0.64),
    _generator(16, 500_455, 2.88, 254.73),
    _generator(20, 583_865, 2.45, 267.48),
    _generator(24, 667_274, 2.14, 278.99),
    _generator(30, 750_683, 2.05, 286.73),
)


def published_for(fields: Mapping) -> list[Published]:
    """Returns the published results for the sizes of a config, given as `fields` by their dotted names."""
    return [found for found in PUBLISHED if all(fields.get(name) == value for name, value in found.sizes.items())]
