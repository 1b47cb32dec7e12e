r"""Presets of the generator: the paper's four sizes on ImageNet, and four for a laptop.

    python -m ibq_jax tokenize --tokenizer=runs/tok --out=runs/codes
    python -m ibq_jax train --config=configs/autoregressive.py:imagenet256_B --config.token_cache=runs/codes \
        --workdir=runs/ar

Every default of stage two is in this file and in common.py, nowhere else. Any field can be overridden on the
command line, e.g. `--config.model.num_layers=8`. Vocabulary, grid and classes come from the token cache.

| preset | layers, heads, width | parameters | length | published FID / IS (arXiv 2412.02692) | measured here |
|---|---|---|---|---|---|
| openmoji32 | 6, 4, 128 | 2.5 M | 800 steps of 8 | - | README: 2 CPU cores |
| openmoji64 | 6, 4, 128 | 2.5 M | 800 steps of 8 | - | README: 1 CPU core |
| photos32 | 6, 4, 128 | 2.5 M | 800 steps of 8 | - | not measured |
| photos64 | 6, 4, 128 | 2.5 M | 800 steps of 8 | - | not measured |
| imagenet256_B | 16, 16, 1024 | 342,994,944 | 300 epochs | 2.88 / 254.73 | not measured |
| imagenet256_L | 20, 20, 1280 | 649,640,960 | 350 epochs | 2.45 / 267.48 | not measured |
| imagenet256_XL | 24, 24, 1536 | 1,076,103,168 | 400 epochs | 2.14 / 278.99 | not measured |
| imagenet256_XXL | 30, 30, 1920 | 2,063,331,840 | 450 epochs | 2.05 / 286.73 | not measured |

The published figures are with the tokenizer of 16,384 codes, and with the guidance and temperature in `sample`. The
authors trained B for about 4 days on 32 accelerators and XXL for about 9 days on 96.
"""

from ml_collections import ConfigDict

from ibq_jax.base.config import preset_folder, run_file

common = run_file(preset_folder() / "common.py")


def _imagenet256(
    layers: int, gamma_init: float, end_lr_factor: float, epochs: int, guidance: float, temperature: float
) -> ConfigDict:
    """Returns the paper's recipe with the released code's settings; a head has 64 channels."""
    config = ConfigDict()
    config.stage = "autoregressive"
    config.seed = 0  # of initial values, data order, dropout and samples
    # Type of the matrix products. Norms, softmax, residual stream and loss are float32, and so are the products where
    # this is "float32", on every machine.
    config.dtype = "bfloat16"
    config.token_cache = ""  # the folder that `tokenize` wrote
    config.tokenizer = ""  # the tokenizer's run, which decodes samples; empty: where the token cache says it is

    config.data = ConfigDict()
    config.data.batch_size = 768  # images per step, over all devices
    config.data.num_workers = 4  # reader processes per host; 0: threads of the training process read
    config.data.num_threads = 2  # reader threads per process; each holds one batch

    _add_model(config, layers, gamma_init)
    _add_training(config, end_lr_factor)
    common.add_common_groups(config, epochs=epochs, images_every=10_000, best_metric="-validation/loss")

    config.sample = ConfigDict()  # defaults of `sample`, and for the samples logged during training
    config.sample.cfg_scale = guidance  # scale of classifier-free guidance; 1: none
    config.sample.temperature = temperature  # 0: takes the most likely code
    config.sample.top_k = 0  # most likely codes to draw from; 0: all
    config.sample.top_p = 1.0  # total probability of the codes to draw from; 1: all
    return config


def _add_model(config: ConfigDict, layers: int, gamma_init: float) -> None:
    config.model = ConfigDict()
    config.model.vocab_size = 0  # number of codes; 0: as in the token cache
    config.model.grid = ()  # rows and columns of an image's codes; (): as in the token cache
    config.model.num_classes = -1  # 0: no classes; -1: as in the token cache
    config.model.num_layers = layers
    config.model.num_heads = layers
    config.model.num_kv_heads = layers  # fewer than num_heads: grouped-query attention
    config.model.embed_dim = 64 * layers
    config.model.gamma_init = gamma_init  # factor on the initial weights of the residual gates (adaLN)
    config.model.dropout = 0.1  # on embeddings, attention outputs and feed-forward outputs
    config.model.use_pretrained_codebook = False  # True: token embeddings from the tokenizer's codebook and two layers
    config.model.codebook_dim = 256  # dimensions of that codebook
    config.model.attention = "auto"  # "xla", "cudnn" (NVIDIA GPUs, in bfloat16), or "auto": cuDNN's where it applies
    # The backward pass keeps of each layer, "dots": products and dropout masks; "blocks": its input; "none": all.
    config.model.remat = "dots"
    config.model.unroll = 0  # layers in a turn of the loop over layers; 0: all on GPUs (docs/plans.md), else one


def _add_training(config: ConfigDict, end_lr_factor: float) -> None:
    config.loss = ConfigDict()
    config.loss.class_dropout = 0.1  # share of labels replaced by "no class", for guidance
    config.loss.implementation = "streamed"  # or "dense", which holds an array [tokens, vocabulary]
    config.loss.block_size = 0  # vocabulary rows per block of the streamed loss; 0: chosen by a memory budget

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 3e-4  # highest
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_fraction = 0.02  # share of the run: 6 of 300 epochs, 9 of 450
    config.optimizer.init_lr_factor = 0.005  # learning rate at the first step, relative to learning_rate
    config.optimizer.hold_fraction = 0.05  # share of the steps after the warm-up with the full learning rate
    config.optimizer.end_lr_factor = end_lr_factor  # learning rate at the last step, relative to learning_rate
    config.optimizer.weight_decay = 0.05  # at the first step
    config.optimizer.weight_decay_end = 0.05  # at the last step, reached along half a cosine
    config.optimizer.decay_all = False  # True: norms and biases decay too, as released
    config.optimizer.gradient_clip = 1.0  # global norm; 0: no clipping
    config.optimizer.moment_dtype = "float32"  # or "bfloat16": half the memory of both moments, rounded at every step
    config.optimizer.ema_decay = 0.0  # per step, of the averaged weights; 0: none are kept

    config.evaluate = ConfigDict()
    config.evaluate.every = 5_000  # steps between evaluations on the validation split of the token cache
    config.evaluate.examples = 10_000  # images of it; 0: all
    config.evaluate.batch_size = 768  # images at a time, over all devices


def _xxl() -> ConfigDict:
    config = _imagenet256(30, gamma_init=1e-5, end_lr_factor=0.01, epochs=450, guidance=2.85, temperature=1.2)
    config.optimizer.weight_decay_end = 0.08
    return config


def _for_a_laptop() -> ConfigDict:
    config = _imagenet256(6, gamma_init=1e-3, end_lr_factor=0.1, epochs=0, guidance=2.0, temperature=0.8)
    config.dtype = "float32"
    config.data.batch_size = 8
    config.data.num_workers = 0
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.embed_dim = 128
    config.model.remat = "none"
    config.model.codebook_dim = 32
    config.optimizer.learning_rate = 2e-3
    config.optimizer.ema_decay = 0.99
    config.train.steps = 800
    config.log.every = 20
    config.log.images_every = 400
    config.log.num_images = 9
    config.evaluate.every = 200
    config.evaluate.examples = 0
    config.evaluate.batch_size = 32
    config.checkpoint.every = 200
    return config


LAPTOP = ("openmoji32", "openmoji64", "photos32", "photos64")
PRESETS = (*LAPTOP, "imagenet256_B", "imagenet256_L", "imagenet256_XL", "imagenet256_XXL")


def get_config(preset: str) -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    if preset in LAPTOP:
        return _for_a_laptop()
    if preset == "imagenet256_B":
        return _imagenet256(16, gamma_init=1e-3, end_lr_factor=0.1, epochs=300, guidance=2.25, temperature=1.1)
    if preset == "imagenet256_L":
        return _imagenet256(20, gamma_init=1e-3, end_lr_factor=0.1, epochs=350, guidance=2.0, temperature=1.0)
    if preset == "imagenet256_XL":
        return _imagenet256(24, gamma_init=1e-4, end_lr_factor=0.01, epochs=400, guidance=2.35, temperature=1.15)
    return _xxl()


def expected_sizes(preset: str) -> dict[str, object]:
    """Returns the sizes of the token cache that the preset is meant for; `plan` takes them, for it needs no cache."""
    if preset in LAPTOP:
        return {"vocab_size": 1_024, "grid": (16, 16), "num_classes": 9 if preset.startswith("openmoji") else 6}
    return {"vocab_size": 16_384, "grid": (16, 16), "num_classes": 1_000}
