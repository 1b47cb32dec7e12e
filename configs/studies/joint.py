"""Does a tokenizer that feels its generator's next-token loss use fewer codes, and does decoding the predictions help?

EOSTok (arXiv 2605.00503) reports that the next-token loss alone lowers usage from 99.8% to 51.8%, and that the
prediction loss restores it. Four settings at equal steps and parameters: both losses on or off. Without both, the
tokenizer is trained as in stage one, and the generator on its codes meanwhile. The weight of the next-token loss is 1,
since with 0.1 nothing is lost (docs/joint.md, which has the outcome).

python -m ibq_jax sweep --study=configs/studies/joint.py --workdir=runs/joint
"""

CONFIG = "configs/joint.py:openmoji32"
OVER = {"joint.next_token_gradient": (False, True), "joint.prediction_weight": (0.0, 1.0)}
SEEDS = 3
OVERRIDES = {
    "joint.next_token_weight": 1.0,
    "train.steps": 300,
    "evaluate.every": 100,
    "checkpoint.every": 300,
    "log.images_every": 300,
    "tokenizer.codebook_monitor.usage_floor": 0.0,
    "tokenizer.evaluate.feature_nets": "efficientnet",
}
