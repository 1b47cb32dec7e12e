"""Which part of IBQ keeps its codes in use: the gradient that its quantizer loss gives every row, or the entropy term.

`quantizer.double_loss=False` leaves out the quantizer loss's first term, mean (z_q - z)^2, and keeps the
straight-through gradient to all codes, VQ's two terms and the entropy term. What was run of it is in docs/collapse.md.

python -m ibq_jax prepare photos --size=32
python -m ibq_jax sweep --study=configs/studies/ibq_parts.py --workdir=runs/ibq_parts
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {"quantizer.double_loss": (True, False), "loss.entropy_weight": (0.05, 0.0)}
SEEDS = 3
OVERRIDES = {
    "data.name": "photos32",
    "codebook.size": 4_096,
    "train.steps": 300,
    "evaluate.every": 300,
    "checkpoint.every": 300,
    "log.images_every": 300,
    "codebook_monitor.usage_floor": 0.0,
}
