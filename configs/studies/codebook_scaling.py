"""The paper's claim, small: as the codebook grows, IBQ keeps it in use and reconstructs better, VQ lets it go.

What came of it, in an hour on two cores: docs/codebook_scaling.md.

python -m ibq_jax prepare openmoji
python -m ibq_jax sweep --study=configs/studies/codebook_scaling.py --workdir=runs/codebook_scaling
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "quantizer.name": ("ibq", "vq"),
    "codebook.size": (256, 1_024, 4_096, 16_384),
}
SEEDS = 2
OVERRIDES = {
    "train.steps": 600,
    "evaluate.every": 300,
    "evaluate.feature_nets": "efficientnet",
    "checkpoint.every": 300,
    "log.images_every": 600,
    "codebook_monitor.usage_floor": 0.0,  # a collapse is what is to be seen
}
