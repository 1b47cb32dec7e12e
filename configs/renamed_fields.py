"""Config fields of earlier versions: what they are called now, and what was done before a field existed.

`ibq_jax.base.config` applies these tables to saved configs, to overrides on the command line, to config files and to
checkpoints, so that old runs and old commands keep working. Nothing is ever removed from them. A line for the tokenizer
or the generator that is written from now on wants one for the joint stage, too, where the field is in the group
`tokenizer` or `generator`, unless it is a field of the run.
"""

# stage -> {old name: new name}
RENAMED = {
    "tokenizer": {
        "data.workers": "data.num_workers",
        "data.threads": "data.num_threads",
        "discriminator.layers": "discriminator.num_layers",
        "evaluate.judges": "evaluate.feature_nets",
        "log.images": "log.num_images",
        "train.accumulate": "train.grad_accum_steps",
        "watch.window_tokens": "codebook_monitor.window_tokens",
        "watch.usage_floor": "codebook_monitor.usage_floor",
        "watch.warmup_steps": "codebook_monitor.grace_steps",
        "watch.slow_factor": "watchdog.slow_factor",
        "watch.slow_seconds": "watchdog.slow_seconds",
        "watch.hang_seconds": "watchdog.hang_seconds",
    },
    "autoregressive": {
        "codes": "token_cache",
        "data.workers": "data.num_workers",
        "data.threads": "data.num_threads",
        "log.images": "log.num_images",
        "model.vocabulary": "model.vocab_size",
        "model.layers": "model.num_layers",
        "model.heads": "model.num_heads",
        "model.kv_heads": "model.num_kv_heads",
        "model.width": "model.embed_dim",
        "optimizer.warmup": "optimizer.warmup_fraction",
        "optimizer.warmup_start": "optimizer.init_lr_factor",
        "optimizer.flat": "optimizer.hold_fraction",
        "optimizer.final_rate": "optimizer.end_lr_factor",
        "train.accumulate": "train.grad_accum_steps",
        "watch.slow_factor": "watchdog.slow_factor",
        "watch.slow_seconds": "watchdog.slow_seconds",
        "watch.hang_seconds": "watchdog.hang_seconds",
    },
    "joint": {},
}

# stage -> {beginning of a leaf's name in a training state: the beginning in checkpoints of earlier versions}
RENAMED_LEAVES = {"tokenizer": {"discriminator/": "adversary/"}, "autoregressive": {}, "joint": {}}

# stage -> {a field that configs saved by earlier versions lack: what was done then}
ADDED = {
    "tokenizer": {
        "quantizer.name": "ibq",
        "quantizer.double_loss": True,
        "quantizer.l2_normalize": False,
        "quantizer.levels": (),
        "quantizer.logit_temperature": 1.0,
        "quantizer.entropy_logits": "own",
        "codebook.init_scale": 1.0,
        "encode.precision": "float32",
        "quantizer.precision": "bfloat16_3x",  # on CPUs what it was, on accelerators more than JAX's default
        "quantizer.gradient_precision": "bfloat16",
        "finetune.freeze": "",
        "finetune.discriminator_warmup_steps": 0,
        "finetune.encoder_rate": 1.0,
        "finetune.codebook_rate": 1.0,
        "finetune.decoder_rate": 1.0,
        "discriminator.name": "patch",
        "discriminator.ramp_steps": 0,
        "discriminator.loss": "hinge",
        "discriminator.r1_weight": 0.0,
        "discriminator.r1_every": 16,
        "discriminator.spectral_norm": False,
        "discriminator.augment": "",
        "discriminator.net": "efficientnet",
        "discriminator.net_side": 224,
        "discriminator.crop_probability": 0.0,
        "discriminator.heads": "maps",
        "loss.features_weight": 0.0,
        "loss.features_net": "efficientnet",
        "loss.logits_weight": 0.0,
        "loss.logits_net": "convnext_small",
        "loss.adversarial": "non_saturating",
        "loss.adaptive_limit": 0.0,
        "alignment.weight": 0.0,
        "alignment.adaptive_limit": 0.0,
        "alignment.net": "dinov2_vits14",
        "alignment.of": "latents",
        "alignment.cosine_margin": 0.5,
        "alignment.distance_margin": 0.25,
        "nets.efficientnet": "",
        "nets.convnext_small": "",
        "nets.dino_vits16": "",
        "nets.dinov2_vits14": "",
        "nets.dinov2_vitb14": "",
        "nets.dinov2_vitl14": "",
        "nets.siglip_vitb16": "",
        "nets.siglip_vitl16": "",
        "optimizer.weight_decay": 0.0,
        "optimizer.moment_dtype": "float32",
        "train.compiler_options": "",
    },
    "autoregressive": {"model.unroll": 1, "optimizer.moment_dtype": "float32", "train.compiler_options": ""},
    "joint": {
        "generator.model.unroll": 1,
        "tokenizer.alignment.adaptive_limit": 0.0,
        "tokenizer.discriminator.heads": "maps",
        "tokenizer.discriminator.crop_probability": 0.0,
        "joint.hidden_alignment.weight": 0.0,
        "joint.hidden_alignment.net": "dinov2_vitb14",
        "joint.hidden_alignment.layer": 0,
        "joint.hidden_alignment.position": "predicted",
        "joint.hidden_alignment.gradient": True,
        "joint.hidden_alignment.temperature": 0.1,
        "joint.hidden_alignment.projector_channels": 2048,
    },
}
