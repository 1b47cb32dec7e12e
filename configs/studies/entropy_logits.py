"""Two kinds of logits for VQ's entropy term: IBQ's dot products, or those by which VQ chooses.

One point was run: docs/collapse.md.

python -m ibq_jax sweep --study=configs/studies/entropy_logits.py --workdir=runs/entropy_logits
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "data.name": ("openmoji", "photos32"),
    "quantizer.name": ("vq", "simvq"),
    "codebook.size": (256, 4_096),
    "quantizer.entropy_logits": ("dot", "distance"),
}
SEEDS = 3
OVERRIDES = {
    "train.steps": 300,
    "evaluate.every": 300,
    "checkpoint.every": 300,
    "log.images_every": 300,
    "codebook_monitor.usage_floor": 0.0,
}
