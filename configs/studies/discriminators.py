"""The patch discriminator against heads on a frozen network, each with and without aligned latents, on photographs.

VAR and GigaTok train with the second discriminator, VA-VAE with the alignment (docs/losses.md has the sources, and the
outcome). Both use EfficientNet-Lite0 here, which works offline. Images of 32 pixels have 8x8 codes, so that the network
sees them at 64 pixels for the discriminator and at 128 for the alignment: two cores have no time for its own 224.

python -m ibq_jax prepare photos --size=32
python -m ibq_jax sweep --study=configs/studies/discriminators.py --workdir=runs/discriminators
"""

CONFIG = "configs/tokenizer.py:photos32"
OVER = {"discriminator.name": ("patch", "dino"), "alignment.weight": (0.0, 0.1)}
SEEDS = 3
OVERRIDES = {
    "model.channel_multipliers": (1, 2, 2),
    "discriminator.net_side": 64,
    "alignment.net": "efficientnet",
    "train.steps": 400,
    "evaluate.every": 400,
    "evaluate.feature_nets": "efficientnet",
    "checkpoint.every": 400,
    "log.images_every": 400,
    "codebook_monitor.usage_floor": 0.0,
}
