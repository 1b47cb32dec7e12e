"""Does the number of codes limit reconstructions yet? FSQ, whose codes need no training, at two sizes.

If 240 codes reconstructed as well as 64,000 after so few steps, the networks would be what is still to be trained, and
a larger codebook in use could not show. What came out is in docs/codebook_scaling.md, with sixteen codes next to it:
`--over codebook.size=16 --config.quantizer.levels="(4,4)"` and the fields below.

python -m ibq_jax prepare openmoji
python -m ibq_jax prepare photos --size=32
python -m ibq_jax sweep --study=configs/studies/code_information.py --workdir=runs/code_information
"""

CONFIG = "configs/tokenizer.py:openmoji32"
OVER = {
    "data.name": ("openmoji", "photos32"),
    "codebook.size": (240, 64_000),
}
SEEDS = 2
OVERRIDES = {
    "quantizer.name": "fsq",
    "train.steps": 600,
    "evaluate.every": 300,
    "evaluate.feature_nets": "efficientnet",
    "checkpoint.every": 600,
    "log.images_every": 600,
    "codebook_monitor.usage_floor": 0.0,
}
