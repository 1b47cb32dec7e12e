"""The paper's claim at small scale: as the codebook grows, IBQ keeps it in use and reconstructs better, VQ collapses.

The results, from an hour on two CPU cores, are in docs/codebook_scaling.md.

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
    "codebook_monitor.usage_floor": 0.0,  # a collapse must not stop the run: it is a result
}
