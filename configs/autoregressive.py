r"""Presets of the generator: the paper's four sizes on ImageNet, and two for a laptop.

    python -m ibq_jax tokenize --tokenizer=runs/tok --out=runs/codes
    python -m ibq_jax train --config=configs/autoregressive.py:imagenet256_B --config.token_cache=runs/codes \
        --workdir=runs/ar

Every default of stage two stands in this file; the code reads `config.x` and knows no second default.
Any field can be overridden on the command line, e.g. `--config.model.num_layers=8`.

| preset | layers, heads, width | parameters | length | published FID / IS (arXiv 2412.02692) | measured here |
|---|---|---|---|---|---|
| openmoji32 | 6, 4, 128 | 2.5 M | 800 steps of 8 | - | README: 2 CPU cores |
| openmoji64 | 6, 4, 128 | 2.5 M | 800 steps of 8 | - | not measured |
| imagenet256_B | 16, 16, 1024 | 342,994,944 | 300 epochs | 2.88 / 254.73 | not measured |
| imagenet256_L | 20, 20, 1280 | 649,640,960 | 350 epochs | 2.45 / 267.48 | not measured |
| imagenet256_XL | 24, 24, 1536 | 1,076,103,168 | 400 epochs | 2.14 / 278.99 | not measured |
| imagenet256_XXL | 30, 30, 1920 | 2,063,331,840 | 450 epochs | 2.05 / 286.73 | not measured |

The published figures are with the tokenizer of 16,384 codes, and guidance and temperature as in `sample` below. The
authors trained B for about 4 days on 32 accelerators and XXL for about 9 days on 96.
"""

from ml_collections import ConfigDict


def _imagenet256(
    layers: int, gamma_init: float, final_rate: float, epochs: int, guidance: float, temperature: float
) -> ConfigDict:
    """The paper's recipe with the released code's settings; a head has 64 channels."""
    config = ConfigDict()
    config.stage = "autoregressive"
    config.seed = 0
    config.dtype = "bfloat16"  # of matrix products; norms, softmax, residual stream and loss are float32 always
    config.token_cache = ""  # the folder that `tokenize` wrote
    config.tokenizer = ""  # the tokenizer's run, for pictures; empty: where the codes say it was

    config.data = ConfigDict()
    config.data.batch_size = 768  # pictures a step, over all devices
    config.data.num_workers = 4  # reader processes per host; 0 reads in threads of this process
    config.data.num_threads = 2  # reader threads per process; each holds a batch

    config.model = ConfigDict()
    config.model.vocab_size = 16_384  # the tokenizer's codes
    config.model.grid = (16, 16)  # codes of a picture, rows and columns
    config.model.num_classes = 1_000
    config.model.num_layers = layers
    config.model.num_heads = layers
    config.model.num_kv_heads = layers  # fewer: grouped-query attention
    config.model.embed_dim = 64 * layers
    config.model.gamma_init = gamma_init  # scale of the first gates' weights
    config.model.dropout = 0.1  # on embeddings, attention outputs and feed-forward outputs
    config.model.use_pretrained_codebook = False  # token embeddings from the tokenizer's codebook and two layers
    config.model.codebook_dim = 256  # of that codebook
    config.model.attention = "xla"  # or "cudnn": jax.nn.dot_product_attention's kernel on GPUs, in bfloat16
    config.model.remat = "none"  # "dots" keeps matrix products for the backward pass, "blocks" only what enters a layer

    config.loss = ConfigDict()
    config.loss.class_dropout = 0.1  # share of labels that become "no class", for guidance
    config.loss.implementation = "streamed"  # or "dense", which holds [tokens, vocabulary]
    config.loss.block_size = 0  # vocabulary rows a block of the streamed loss; 0 chooses by a memory budget

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_fraction = 0.02  # share of the run: 6 of 300 epochs, 9 of 450
    config.optimizer.init_lr_factor = 0.005  # of the rate, at the first step
    config.optimizer.hold_fraction = 0.05  # share of the steps after the warm-up before the rate falls
    config.optimizer.end_lr_factor = final_rate  # of the rate, at the last step
    config.optimizer.weight_decay = 0.05
    config.optimizer.weight_decay_end = 0.05  # reached along half a cosine
    config.optimizer.decay_all = False  # True as released: norms and biases decay too
    config.optimizer.gradient_clip = 1.0  # global norm; 0: none
    config.optimizer.ema_decay = 0.0  # 0: no average is kept

    config.train = ConfigDict()
    config.train.epochs = epochs
    config.train.steps = 0  # 0: epochs times the steps of an epoch
    config.train.grad_accum_steps = 1  # micro-batches a step

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: every device the other axes leave
    config.mesh.fsdp = 1
    config.mesh.codebook = 1

    config.sample = ConfigDict()  # defaults of `sample`, and of the pictures in TensorBoard
    config.sample.cfg_scale = guidance
    config.sample.temperature = temperature
    config.sample.top_k = 0
    config.sample.top_p = 1.0

    config.watchdog = ConfigDict()
    config.watchdog.slow_factor = (
        10.0  # times its usual duration that a part of a step may take, before stacks are dumped
    )
    config.watchdog.slow_seconds = 60.0  # and at least so long
    config.watchdog.hang_seconds = 3600.0  # after which the process ends, to be started again; 0: never

    config.log = ConfigDict()
    config.log.every = 50  # steps between scalars
    config.log.images_every = 10_000
    config.log.num_images = 8

    config.evaluate = ConfigDict()
    config.evaluate.every = 5_000  # steps between evaluations on the validation codes
    config.evaluate.examples = 10_000  # pictures of them; 0: all
    config.evaluate.batch_size = 768

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 2_500
    config.checkpoint.keep_last = 3
    config.checkpoint.keep_best = 1
    config.checkpoint.best_metric = "-validation/loss"
    return config


def _xxl() -> ConfigDict:
    config = _imagenet256(30, gamma_init=1e-5, final_rate=0.01, epochs=450, guidance=2.85, temperature=1.2)
    config.optimizer.weight_decay_end = 0.08
    return config


def _openmoji() -> ConfigDict:
    config = _imagenet256(6, gamma_init=1e-3, final_rate=0.1, epochs=0, guidance=2.0, temperature=0.8)
    config.dtype = "float32"
    config.data.batch_size = 8
    config.data.num_workers = 0
    config.model.vocab_size = 1_024
    config.model.num_classes = 9
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.embed_dim = 128
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


PRESETS = ("openmoji32", "openmoji64", "imagenet256_B", "imagenet256_L", "imagenet256_XL", "imagenet256_XXL")


def get_config(preset: str) -> ConfigDict:
    if preset.startswith("openmoji"):
        return _openmoji()  # both tokenizers make 16x16 codes of 1,024
    if preset == "imagenet256_B":
        return _imagenet256(16, gamma_init=1e-3, final_rate=0.1, epochs=300, guidance=2.25, temperature=1.1)
    if preset == "imagenet256_L":
        return _imagenet256(20, gamma_init=1e-3, final_rate=0.1, epochs=350, guidance=2.0, temperature=1.0)
    if preset == "imagenet256_XL":
        return _imagenet256(24, gamma_init=1e-4, final_rate=0.01, epochs=400, guidance=2.35, temperature=1.15)
    return _xxl()
