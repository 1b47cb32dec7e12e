"""Four candidates for what keeps 4,096 codes in use: dimension, initial scale, learning rate, entropy term.

The results, from half an hour on two CPU cores, are in docs/collapse.md.

python -m ibq_jax sweep --study=configs/studies/collapse.py --workdir=runs/collapse
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "codebook.dim": (32, 256),
    "codebook.init_scale": (1.0, 0.1),
    "optimizer.learning_rate": (1e-3, 1e-4),
    "loss.entropy_weight": (0.05, 0.0),
}
OVERRIDES = {
    "codebook.size": 4_096,
    "train.steps": 300,
    "evaluate.every": 300,
    "checkpoint.every": 300,
    "log.images_every": 300,
    "codebook_monitor.usage_floor": 0.0,
}
