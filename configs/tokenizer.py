"""Presets of the image tokenizer: the paper's ImageNet models, its pretrained models, and two for a laptop.

    python -m ibq_jax train --config=configs/tokenizer.py:imagenet256_16384 --workdir=runs/tok

Every default of stage one stands in this file; the code reads `config.x` and knows no second default.
Any field can be overridden on the command line, e.g. `--config.codebook.size=8192`. All make 16x16 codes of a picture.

| preset | data | codes x dim | length | published (arXiv 2412.02692) | measured here |
|---|---|---|---|---|---|
| openmoji32 | openmoji, 32 px | 1,024 x 32 | 1,000 steps of 16 | - | README: 2 CPU cores |
| openmoji64 | openmoji, 64 px | 1,024 x 32 | 4,000 steps of 16 | - | not measured |
| imagenet256_1024 | imagenet2012 | 1,024 x 256 | 330 epochs | rFID 2.24, usage 99% | not measured |
| imagenet256_8192 | imagenet2012 | 8,192 x 256 | 280 epochs | rFID 1.87, usage 98% | not measured |
| imagenet256_16384 | imagenet2012 | 16,384 x 256 | 330 epochs | rFID 1.37, usage 96% | not measured |
| imagenet256_262144 | imagenet2012 | 262,144 x 256 | 330 epochs | rFID 1.00, usage 84% | not measured |
| pretrain256_16384 | your tar shards | 16,384 x 256 | 1.5 M steps of 256 | rFID 2.06, PSNR 22.01 | not measured |
| pretrain256_262144 | your tar shards | 262,144 x 256 | 1.5 M steps of 256 | rFID 1.53, PSNR 22.69 | not measured |

The authors trained each ImageNet tokenizer for 4 to 7 days on 64 accelerators.
"""

from ml_collections import ConfigDict


def _imagenet256(codebook_size: int, epochs: int = 330, drop_epochs: tuple[int, ...] = (250, 300)) -> ConfigDict:
    """The paper's recipe (arXiv 2412.02692, section 4.1) with the released code's settings."""
    config = ConfigDict()
    config.stage = "tokenizer"
    config.seed = 0
    config.dtype = "bfloat16"  # of convolutions; the quantizer and the losses are float32 always

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS data set under data.dir, made by `prepare` or by TFDS
    config.data.dir = "data"
    config.data.train_split = "train"
    config.data.validation_split = "validation"
    config.data.image_size = 256  # pixels; the side of the square crop
    config.data.resize = 256  # pixels; the shorter side before cropping
    config.data.batch_size = 256  # images a step, over all devices
    config.data.num_workers = 8  # reader processes per host; 0 reads in threads of this process
    config.data.num_threads = 2  # reader threads per process; each holds a batch

    config.model = ConfigDict()
    config.model.resolution = 256  # pixels; attention levels are counted from it
    config.model.channels = 128
    config.model.channel_multipliers = (1, 1, 2, 2, 4)
    config.model.num_res_blocks = 4
    config.model.attention_resolutions = (16,)
    config.model.z_channels = 256
    config.model.remat = "none"  # or "blocks": insides of residual blocks are computed again, not kept

    config.codebook = ConfigDict()
    config.codebook.size = codebook_size
    config.codebook.dim = 256  # of ibq, vq and simvq; of lfq and fsq the size decides
    config.codebook.init_scale = 1.0  # ibq's standard deviation at the start, as released
    config.codebook.block_size = 0  # codes a block of the streamed quantizer; 0 chooses by a memory budget
    config.codebook.implementation = "streamed"  # or "dense", the plain form; of ibq and lfq

    config.quantizer = ConfigDict()
    config.quantizer.name = "ibq"  # or, to compare with it, "vq", "simvq", "lfq" (K a power of two) or "fsq"
    config.quantizer.beta = 0.25
    config.quantizer.beta_on = "codebook"  # as released; "commitment" is the paper's text, and what vq, simvq, lfq do
    config.quantizer.double_loss = True  # of ibq; False: without the term that reaches every row
    config.quantizer.l2_normalize = False  # of vq: latents and rows of length 1
    config.quantizer.levels = ()  # of fsq, whose product is codebook.size, such as (8, 8, 8, 5); (): the usual ones
    config.quantizer.entropy_temperature = 0.01  # this and the following: of ibq and lfq
    config.quantizer.entropy_group_tokens = 1024  # tokens an average entropy is taken over; 0: the whole batch
    config.quantizer.sample_entropy_weight = 1.0
    config.quantizer.batch_entropy_weight = 1.0

    config.discriminator = ConfigDict()
    config.discriminator.channels = 64
    config.discriminator.num_layers = 3
    config.discriminator.norm_group = 4  # images a batch norm sees at once; 0: the whole batch
    config.discriminator.start_step = 0  # before it neither network sees an adversarial loss

    config.loss = ConfigDict()
    config.loss.quantizer_weight = 1.0
    config.loss.entropy_weight = 0.05
    config.loss.perceptual_weight = 1.0
    config.loss.perceptual_file = ""  # torchvision's VGG16; empty: $IBQ_VGG16, then ~/.cache/ibq_jax
    config.loss.adversarial_weight = 0.1
    config.loss.lecam_weight = 0.05
    config.loss.lecam_decay = 0.999

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.beta1 = 0.5
    config.optimizer.beta2 = 0.9
    config.optimizer.warmup_steps = 0
    config.optimizer.drop_epochs = drop_epochs  # the rate is multiplied by drop_factor after each
    config.optimizer.drop_factor = 0.1
    config.optimizer.gradient_clip = 0.0  # global norm; 0: none
    config.optimizer.ema_decay = 0.999

    config.train = ConfigDict()
    config.train.epochs = epochs
    config.train.steps = 0  # 0: epochs times the steps of an epoch
    config.train.grad_accum_steps = 1  # micro-batches a step

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: every device the other axes leave
    config.mesh.fsdp = 1
    config.mesh.codebook = 1

    config.codebook_monitor = ConfigDict()
    config.codebook_monitor.window_tokens = 2**22  # a code is in use if a token of this window chose it
    config.codebook_monitor.usage_floor = 0.02  # a run whose usage falls under it after grace_steps is stopped
    config.codebook_monitor.grace_steps = 2_000
    config.watchdog = ConfigDict()
    config.watchdog.slow_factor = (
        10.0  # times its usual duration that a part of a step may take, before stacks are dumped
    )
    config.watchdog.slow_seconds = 60.0  # and at least so long
    config.watchdog.hang_seconds = 3600.0  # after which the process ends, to be started again; 0: never

    config.log = ConfigDict()
    config.log.every = 50  # steps between scalars
    config.log.images_every = 2_500
    config.log.num_images = 8

    config.evaluate = ConfigDict()
    config.evaluate.every = 5_000  # steps between evaluations on the validation split
    config.evaluate.examples = 5_000  # images of it; 0: all
    config.evaluate.batch_size = 256
    config.evaluate.protocol = "clean"  # or "seed_voken": see ibq_jax/evaluate/protocols.py
    config.evaluate.feature_nets = ""  # nets that measure too, of "efficientnet,inception,vgg16,alexnet"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 2_500
    config.checkpoint.keep_last = 3
    config.checkpoint.keep_best = 1
    config.checkpoint.best_metric = "validation/psnr"
    return config


def _pretrain256(codebook_size: int) -> ConfigDict:
    config = _imagenet256(codebook_size, epochs=0, drop_epochs=())
    config.data.name = "pretrain"  # `prepare tar --name=pretrain` makes it from webdataset shards
    config.train.steps = 1_500_000
    return config


def _openmoji(size: int, channel_multipliers: tuple[int, ...], steps: int) -> ConfigDict:
    config = _imagenet256(1024, epochs=0, drop_epochs=())
    config.dtype = "float32"
    config.data.name = "openmoji"
    config.data.image_size = size
    config.data.resize = size
    config.data.batch_size = 16
    config.data.num_workers = 0
    config.model.resolution = size
    config.model.channels = 32
    config.model.channel_multipliers = channel_multipliers
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.model.z_channels = 64
    config.codebook.dim = 32
    config.discriminator.channels = 16
    config.discriminator.num_layers = 2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.ema_decay = 0.99
    config.train.steps = steps
    config.codebook_monitor.window_tokens = 2**17
    config.codebook_monitor.grace_steps = 200
    config.log.every = 10
    config.log.images_every = 200
    config.evaluate.every = 200
    config.evaluate.examples = 0
    config.evaluate.batch_size = 32
    config.checkpoint.every = 200
    return config


PRESETS = (
    "openmoji32",
    "openmoji64",
    "imagenet256_1024",
    "imagenet256_8192",
    "imagenet256_16384",
    "imagenet256_262144",
    "pretrain256_16384",
    "pretrain256_262144",
)


def get_config(preset: str) -> ConfigDict:
    family, _, size = preset.partition("_")
    if family == "imagenet256":
        if size == "8192":
            return _imagenet256(8192, epochs=280, drop_epochs=(250,))
        return _imagenet256(int(size))
    if family == "pretrain256":
        return _pretrain256(int(size))
    if family == "openmoji64":
        return _openmoji(64, channel_multipliers=(1, 2, 2), steps=4_000)
    return _openmoji(32, channel_multipliers=(1, 2), steps=1_000)
