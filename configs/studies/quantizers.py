"""All quantizers, at two codebook sizes. Not measured.

python -m ibq_jax sweep --study=configs/studies/quantizers.py --workdir=runs/quantizers
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "quantizer.name": ("ibq", "vq", "simvq", "lfq", "fsq"),
    "codebook.size": (1_024, 16_384),
}
OVERRIDES = {
    "train.steps": 600,
    "evaluate.every": 300,
    "evaluate.feature_nets": "efficientnet",
    "checkpoint.every": 300,
    "log.images_every": 600,
    "codebook_monitor.usage_floor": 0.0,
}
