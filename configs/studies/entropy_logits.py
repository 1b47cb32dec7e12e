"""Why VQ loses its codes although it has IBQ's entropy term: by the logits of that term, or by where the codes start.

VQGAN's codes start within 1/size of zero (codebook.init_scale=0), IBQ's at a standard deviation of 1. What was run of
it is in docs/collapse.md.

python -m ibq_jax prepare photos --size=32
python -m ibq_jax sweep --study=configs/studies/entropy_logits.py --workdir=runs/entropy_logits
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {"quantizer.entropy_logits": ("dot", "distance"), "codebook.init_scale": (0.0, 1.0)}
SEEDS = 3
OVERRIDES = {
    "quantizer.name": "vq",
    "data.name": "photos32",
    "codebook.size": 4_096,
    "train.steps": 300,
    "evaluate.every": 300,
    "checkpoint.every": 300,
    "log.images_every": 300,
    "codebook_monitor.usage_floor": 0.0,
}
