"""Presets of the image tokenizer: the paper's ImageNet models, its pretrained models, Emu3.5's, and four for a laptop.

    python -m ibq_jax train --config=configs/tokenizer.py:imagenet256_16384 --workdir=runs/tok

Every default of stage one is in this file and in common.py, nowhere else. Any field can be overridden on the
command line, e.g. `--config.codebook.size=8192`. All presets turn an image into 16x16 codes.

| preset | data | codebook size x dim | length | published (arXiv 2412.02692) | measured here |
|---|---|---|---|---|---|
| openmoji32 | openmoji, 32 px | 1,024 x 32 | 1,000 steps of 16 | - | README: 2 CPU cores |
| openmoji64 | openmoji, 64 px | 1,024 x 32 | 4,000 steps of 16 | - | README: 2,500 steps, 1 CPU core |
| photos32 | photos32, 32 px | 1,024 x 32 | 1,000 steps of 16 | - | not measured |
| photos64 | photos64, 64 px | 1,024 x 32 | 4,000 steps of 16 | - | not measured |
| imagenet256_1024 | imagenet2012 | 1,024 x 256 | 330 epochs | rFID 2.24, usage 99% | not measured |
| imagenet256_8192 | imagenet2012 | 8,192 x 256 | 280 epochs | rFID 1.87, usage 98% | not measured |
| imagenet256_16384 | imagenet2012 | 16,384 x 256 | 330 epochs | rFID 1.37, usage 96% | not measured |
| imagenet256_262144 | imagenet2012 | 262,144 x 256 | 330 epochs | rFID 1.00, usage 84% | not measured |
| pretrain256_16384 | your tar shards | 16,384 x 256 | 1.5 M steps of 256 | rFID 2.06, PSNR 22.01 | not measured |
| pretrain256_262144 | your tar shards | 262,144 x 256 | 1.5 M steps of 256 | rFID 1.53, PSNR 22.69 | not measured |
| emu35_131072 | your tar shards | 131,072 x 256 | 1.5 M steps of 256 | sizes of arXiv 2510.26583 | not measured |
| finetune_decoder | imagenet2012 | 16,384 x 256 | 100,000 steps of 256 | its start: rFID 1.37 | not measured |
| finetune_photos | your photographs | 16,384 x 256 | 20,000 steps of 64 | - | not measured |

The authors trained each ImageNet tokenizer for 4 to 7 days on 64 accelerators. The last two presets go on from trained
weights, `--init=hf://TencentARC/IBQ-Tokenizer-16384` (docs/finetuning.md).
"""

from ml_collections import ConfigDict

from ibq_jax.base.config import preset_folder, run_file

common = run_file(preset_folder() / "common.py")


def _imagenet256(codebook_size: int, epochs: int = 330, drop_epochs: tuple[int, ...] = (250, 300)) -> ConfigDict:
    """Returns the paper's recipe (arXiv 2412.02692, section 4.1) with the released code's settings."""
    config = ConfigDict()
    config.stage = "tokenizer"
    config.seed = 0  # of initial values, data order and crops
    # Type of the convolutions in training, in the autoencoder, the discriminator and LPIPS: "bfloat16" or "float32",
    # whose products are then float32 on every machine. The losses are float32 always.
    config.dtype = "bfloat16"
    config.encode = ConfigDict()
    # The precision of every product between images and codes wherever codes are given to somebody (tokenize, evaluate,
    # validation): "float32", "bfloat16_3x", "tf32" or "bfloat16", see docs/precision.md.
    config.encode.precision = "float32"
    _add_data_and_networks(config)
    _add_quantizer(config, codebook_size)
    _add_training(config, drop_epochs)
    _add_finetuning(config)
    common.add_common_groups(config, epochs=epochs, images_every=2_500, best_metric="validation/psnr")
    return config


def _add_data_and_networks(config: ConfigDict) -> None:
    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS data set in data.dir, made by `prepare` or by TFDS
    config.data.dir = "data"
    config.data.train_split = "train"
    config.data.validation_split = "validation"
    config.data.resize = 256  # pixels of the shorter side before cropping
    config.data.image_size = 256  # pixels of the side of the square crop
    config.data.batch_size = 256  # images per step, over all devices
    config.data.num_workers = 8  # reader processes per host; 0: threads of the training process read
    config.data.num_threads = 2  # reader threads per process; each holds one batch

    config.model = ConfigDict()  # the autoencoder
    config.model.resolution = 256  # pixels; attention_resolutions are counted down from it
    config.model.channels = 128  # of the first level, at full resolution
    config.model.channel_multipliers = (1, 1, 2, 2, 4)  # one per level; each level but the first halves the resolution
    config.model.num_res_blocks = 4  # per level of the encoder; the decoder has one more
    config.model.attention_resolutions = (16,)  # pixels; levels of these resolutions have attention
    config.model.z_channels = 256  # encoder outputs, before they are projected to the codes' dimension
    config.model.remat = "none"  # "blocks": the backward pass computes residual blocks again, to save memory

    _add_discriminator(config)


def _add_discriminator(config: ConfigDict) -> None:
    config.discriminator = ConfigDict()  # docs/losses.md has the sources and formulas
    config.discriminator.name = "patch"  # or "stylegan", "dino" (heads on a frozen network), "none"
    config.discriminator.channels = 64  # of the first layer; dino: of each head
    config.discriminator.num_layers = 3  # patch: layers that halve the resolution
    config.discriminator.norm_group = 4  # images that a batch norm or deviation sees together; 0: the whole batch
    config.discriminator.start_step = 0  # steps before the adversarial losses of both networks set in
    config.discriminator.ramp_steps = 0  # steps after that in which loss.adversarial_weight rises from 0
    config.discriminator.loss = "hinge"  # or "non_saturating", "lsgan"
    config.discriminator.r1_weight = 0.0  # of the penalty on its gradients at images; 0: off
    config.discriminator.r1_every = 16  # steps between penalties, which then weigh as many times as much
    config.discriminator.spectral_norm = False  # True: kernels are divided by their largest singular value
    config.discriminator.augment = ""  # of all it sees: any of "color,translation,cutout" (DiffAugment)
    config.discriminator.net = "efficientnet"  # dino: or "convnext_small", "dino_vits16", "dinov2_vits14", ...
    config.discriminator.net_side = 224  # dino: pixels to which images are resized for the network; 0: none
    # dino: share of looks at a batch that take a piece of net_side pixels, at random, instead of resizing; VAR: 0.5
    config.discriminator.crop_probability = 0.0
    config.discriminator.heads = "maps"  # dino: or "tokens" of a vision transformer, in one dimension, as in VAR


def _add_quantizer(config: ConfigDict, codebook_size: int) -> None:
    config.codebook = ConfigDict()
    config.codebook.size = codebook_size  # number of codes
    config.codebook.dim = 256  # dimensions of a code; lfq and fsq derive theirs from the size
    config.codebook.init_scale = 0.0  # ibq and vq: standard deviation of the initial codes; 0: as published
    config.codebook.block_size = 0  # codes per block of the streamed quantizer; 0: chosen by a memory budget
    config.codebook.implementation = "streamed"  # or "dense", the plain form; for ibq and lfq

    config.quantizer = ConfigDict()
    config.quantizer.name = "ibq"  # or, for comparison, "vq", "simvq", "lfq" (size a power of two) or "fsq"
    config.quantizer.beta = 0.25  # weight of the term that beta_on names
    config.quantizer.beta_on = "codebook"  # as released; "commitment": as in the paper's text, vq, simvq and lfq
    config.quantizer.double_loss = True  # ibq; False: without the term whose gradient reaches every code
    config.quantizer.l2_normalize = False  # ibq and vq; True: latents and codes are divided by their lengths
    config.quantizer.logit_temperature = 1.0  # ibq: divides all logits; bounded ones (l2_normalize) want less than 1
    config.quantizer.levels = ()  # fsq: their product is codebook.size, e.g. (8, 8, 8, 5); (): the usual ones
    # "own": vq and simvq have no entropy loss; "dot": ibq's, of the same logits; "distance": of those by which they
    # choose. The fields below it are of quantizers with an entropy loss.
    config.quantizer.entropy_logits = "own"
    config.quantizer.precision = "bfloat16_3x"  # of the logits in training; see docs/precision.md
    config.quantizer.gradient_precision = "bfloat16"  # of the products that only gradients come from
    config.quantizer.entropy_temperature = 0.01  # divides the logits of the entropies
    config.quantizer.entropy_group_tokens = 1024  # tokens per batch entropy; 0: the whole batch
    config.quantizer.sample_entropy_weight = 1.0  # within loss.entropy_weight
    config.quantizer.batch_entropy_weight = 1.0  # within loss.entropy_weight

    config.codebook_monitor = ConfigDict()
    config.codebook_monitor.window_tokens = 2**22  # a code counts as used if one of the last so many tokens chose it
    config.codebook_monitor.usage_floor = 0.02  # the run stops if a smaller share of the codes is used
    config.codebook_monitor.grace_steps = 2_000  # steps before usage_floor applies


def _add_training(config: ConfigDict, drop_epochs: tuple[int, ...]) -> None:
    config.loss = ConfigDict()
    config.loss.quantizer_weight = 1.0
    config.loss.entropy_weight = 0.05
    config.loss.perceptual_weight = 1.0  # of LPIPS; 0: off
    config.loss.perceptual_file = ""  # torchvision's VGG16; empty: $IBQ_VGG16, then ~/.cache/ibq_jax
    config.loss.features_weight = 0.0  # of the distance of the hidden maps of a frozen network; 0: off
    config.loss.features_net = "efficientnet"  # as discriminator.net
    config.loss.logits_weight = 0.0  # of the squared difference of the class logits of a frozen network; 0: off
    config.loss.logits_net = "convnext_small"  # or "efficientnet"
    config.loss.adversarial_weight = 0.1  # 0: no discriminator
    config.loss.adversarial = "non_saturating"  # the tokenizer's loss against it; or "hinge", "lsgan"
    config.loss.adaptive_limit = 0.0  # largest factor of VQGAN's adaptive weight, there 10,000; 0: no such factor
    config.loss.lecam_weight = 0.05  # regularises the discriminator
    config.loss.lecam_decay = 0.999  # per step, of the averages that LeCAM uses

    config.alignment = ConfigDict()  # of latents with a frozen network's features (VA-VAE's VF loss)
    config.alignment.weight = 0.0  # there 0.1; 0: off
    config.alignment.adaptive_limit = 0.0  # largest factor of VA-VAE's adaptive weight, there 1e8; 0: no such factor
    config.alignment.net = "dinov2_vits14"  # as discriminator.net
    config.alignment.of = "latents"  # or "decoder": its hidden map at the lowest resolution
    config.alignment.cosine_margin = 0.5  # positions whose cosine is within this of 1 cost nothing
    config.alignment.distance_margin = 0.25  # pairs of positions whose cosines differ by less cost nothing

    config.nets = ConfigDict()  # files of frozen networks; empty: $IBQ_NAME, then ~/.cache/ibq_jax
    config.nets.efficientnet = ""  # empty: in the package that is installed with this one
    config.nets.convnext_small = ""  # torchvision's or timm's
    config.nets.dino_vits16 = ""  # the authors' or timm's, as the next ones
    config.nets.dinov2_vits14 = ""
    config.nets.dinov2_vitb14 = ""
    config.nets.dinov2_vitl14 = ""
    config.nets.siglip_vitb16 = ""  # model.safetensors of google/siglip-base-patch16-224, or timm's
    config.nets.siglip_vitl16 = ""  # of google/siglip-large-patch16-256

    config.optimizer = ConfigDict()  # Adam, for the tokenizer and for the discriminator
    config.optimizer.learning_rate = 1e-4
    config.optimizer.beta1 = 0.5
    config.optimizer.beta2 = 0.9
    config.optimizer.warmup_steps = 0  # steps over which the learning rate rises from 0
    config.optimizer.drop_epochs = drop_epochs  # after each, the learning rate is multiplied by drop_factor
    config.optimizer.drop_factor = 0.1
    config.optimizer.gradient_clip = 0.0  # global norm; 0: no clipping
    config.optimizer.weight_decay = 0.0  # AdamW's, of the kernels of all layers; 0: Adam
    config.optimizer.moment_dtype = "float32"  # or "bfloat16": half the memory of both moments, rounded at every step
    config.optimizer.ema_decay = 0.999  # per step, of the averaged weights

    config.evaluate = ConfigDict()
    config.evaluate.every = 5_000  # steps between evaluations on the validation split
    config.evaluate.examples = 5_000  # images of it; 0: all
    config.evaluate.batch_size = 256  # images at a time, over all devices
    config.evaluate.protocol = "clean"  # or "seed_voken": see ibq_jax/evaluate/protocols.py
    config.evaluate.feature_nets = ""  # nets for more metrics: any of "efficientnet,inception,vgg16,alexnet"


def _add_finetuning(config: ConfigDict) -> None:
    config.finetune = ConfigDict()  # for runs that start from trained weights, `train --init`; see docs/finetuning.md
    # Parts that stay as they are, e.g. "encoder,codebook": any of encoder (with quant_conv), codebook, decoder (with
    # post_quant_conv). They take no gradient, no memory of the optimizer and no average.
    config.finetune.freeze = ""
    config.finetune.discriminator_warmup_steps = 0  # first steps, in which only the discriminator is trained
    config.finetune.encoder_rate = 1.0  # multiplies the learning rate of a part
    config.finetune.codebook_rate = 1.0
    config.finetune.decoder_rate = 1.0


def _pretrain256(codebook_size: int) -> ConfigDict:
    config = _imagenet256(codebook_size, epochs=0, drop_epochs=())
    config.data.name = "pretrain"  # made by `prepare tar --name=pretrain` from webdataset shards
    config.train.steps = 1_500_000
    return config


def _emu35(codebook_size: int) -> ConfigDict:
    """Returns the sizes of Emu3.5's tokenizer; how it was trained is not published."""
    config = _pretrain256(codebook_size)
    config.model.channels = 256
    return config


def _finetune_decoder() -> ConfigDict:
    """Returns the config of a better decoder for codes that stay valid; published files have no discriminator."""
    config = _imagenet256(16384, epochs=0, drop_epochs=())
    config.finetune.freeze = "encoder,codebook"
    config.finetune.discriminator_warmup_steps = 5_000
    config.train.steps = 100_000
    return config


def _finetune_photos() -> ConfigDict:
    """Returns the config of a tokenizer for photographs of one's own, all of whose parts go on at a low rate."""
    config = _imagenet256(16384, epochs=0, drop_epochs=())
    config.data.name = "photos"  # made by `prepare folder --name=photos`
    config.data.batch_size = 64
    config.optimizer.learning_rate = 2e-5
    config.finetune.discriminator_warmup_steps = 2_000
    config.train.steps = 20_000
    return config


def _for_a_laptop(data: str, size: int) -> ConfigDict:
    """Returns the config of small images, 32 or 64 pixels per side."""
    config = _imagenet256(1024, epochs=0, drop_epochs=())
    config.dtype = "float32"
    config.data.name = data
    config.data.image_size = size
    config.data.resize = size
    config.data.batch_size = 16
    config.data.num_workers = 0
    config.model.resolution = size
    config.model.channels = 32
    config.model.channel_multipliers = {32: (1, 2), 64: (1, 2, 2)}[size]
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.model.z_channels = 64
    config.codebook.dim = 32
    config.discriminator.channels = 16
    config.discriminator.num_layers = 2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.ema_decay = 0.99
    config.train.steps = {32: 1_000, 64: 4_000}[size]
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
    "photos32",
    "photos64",
    "imagenet256_1024",
    "imagenet256_8192",
    "imagenet256_16384",
    "imagenet256_262144",
    "pretrain256_16384",
    "pretrain256_262144",
    "emu35_131072",
    "finetune_decoder",
    "finetune_photos",
)


def get_config(preset: str) -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    family, _, size = preset.partition("_")
    if family == "imagenet256":
        if size == "8192":
            return _imagenet256(8192, epochs=280, drop_epochs=(250,))
        return _imagenet256(int(size))
    if family == "pretrain256":
        return _pretrain256(int(size))
    if family == "emu35":
        return _emu35(int(size))
    if family == "finetune":
        return _finetune_decoder() if size == "decoder" else _finetune_photos()
    data, side = preset[:-2], int(preset[-2:])
    return _for_a_laptop(data if data == "openmoji" else preset, side)  # one set of emojis is for both sizes
