"""Quantizer or entropy term, which keeps codes in use: every quantizer with IBQ's entropy loss and without it.

On emojis and on photographs. VQ and SimVQ get the same function of the same logits, z . e; entropy_logits.py compares
that with the logits by which they choose. Which part was run, and what came out, is in docs/collapse.md.

python -m ibq_jax prepare openmoji
python -m ibq_jax prepare photos --size=32
python -m ibq_jax sweep --study=configs/studies/codes_in_use.py --workdir=runs/codes_in_use
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "data.name": ("openmoji", "photos32"),
    "quantizer.name": ("ibq", "vq", "simvq"),
    "codebook.size": (256, 1_024, 4_096, 16_384),
    "codebook.dim": (32, 256),
    "loss.entropy_weight": (0.05, 0.0),
}
SEEDS = 3
OVERRIDES = {
    "quantizer.entropy_logits": "dot",
    "train.steps": 300,
    "evaluate.every": 300,
    "checkpoint.every": 300,
    "log.images_every": 300,
    "codebook_monitor.usage_floor": 0.0,  # a collapse must not stop the run: it is a result
}
