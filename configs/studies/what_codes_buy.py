"""Gains by a large codebook in use: reconstructions at equal steps, at equal time and at several lengths.

Not measured. For equal time, compare rows of equal "time" in the table. `evaluate --run=POINT` adds what it measures,
LPIPS among it where its files are there.

python -m ibq_jax prepare openmoji
python -m ibq_jax prepare photos --size=32
python -m ibq_jax sweep --study=configs/studies/what_codes_buy.py --workdir=runs/what_codes_buy
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "data.name": ("openmoji", "photos32"),
    "quantizer.name": ("ibq", "vq"),
    "codebook.size": (256, 1_024, 4_096, 16_384),
    "train.steps": (600, 2_000, 6_000),
}
SEEDS = 3
OVERRIDES = {
    "evaluate.every": 600,
    "evaluate.feature_nets": "efficientnet",
    "checkpoint.every": 600,
    "log.images_every": 600,
    "codebook_monitor.usage_floor": 0.0,
}
