r"""Presets of the joint stage: a tokenizer and a generator of its codes, trained together (docs/joint.md).

    python -m ibq_jax train --config=configs/joint.py:openmoji32 --workdir=runs/joint

A joint config is made of a tokenizer's preset and a generator's. What belongs to the run stands at the top, under the
names that both stages have for it: seed, data.batch_size, train, mesh, log, ... All other fields stand in the groups
`tokenizer` and `generator`, under their names and with their values in those presets, such as
`--config.tokenizer.codebook.size=8192` and `--config.generator.model.num_layers=8`. Where the presets differ about the
run, the tokenizer's holds. This file has the defaults of the group `joint`.

Vocabulary, grid and classes of the generator follow from the tokenizer and the data set.

| preset | tokenizer | generator | measured here |
|---|---|---|---|
| openmoji32 | openmoji32 | openmoji32 | not measured |
| openmoji64 | openmoji64 | openmoji64 | not measured |
| imagenet256_16384_B | imagenet256_16384 | imagenet256_B | not measured |
"""

from ml_collections import ConfigDict

from ibq_jax.base.config import flatten, nested, preset_folder, run_file

OF_THE_RUN = ("seed", "data", "train", "mesh", "log", "evaluate", "checkpoint", "watchdog")  # fields and groups
OF_EACH_PART = ("stage", "checkpoint.best_metric")  # fields that both presets have, and that differ by meaning
WITHOUT = ("stage", "token_cache", "tokenizer")  # fields of the presets that the joint stage fills in


def _joint(tokenizer: str, generator: str) -> ConfigDict:
    """Returns the config made of a preset of configs/tokenizer.py and one of configs/autoregressive.py."""
    parts = {"tokenizer": _fields("tokenizer.py", tokenizer), "generator": _fields("autoregressive.py", generator)}
    shared = {
        name: value
        for name, value in parts["tokenizer"].items()
        if name in parts["generator"] and name.split(".")[0] in OF_THE_RUN and name not in OF_EACH_PART
    }
    own = {
        part: nested({name: value for name, value in fields.items() if name not in shared and name not in WITHOUT})
        for part, fields in parts.items()
    }
    config = ConfigDict({"stage": "joint", **nested(shared), **own})
    config.checkpoint.best_metric = "validation/psnr"

    config.joint = ConfigDict()
    # True: the gradient of the next-token loss reaches the encoder and the codebook through the token embeddings.
    # False: the codes are constants for it, as in stage two.
    config.joint.next_token_gradient = True
    # These two multiply the next-token loss and the prediction loss, which are added to the tokenizer's own losses.
    # The sources give no such weights.
    config.joint.next_token_weight = 0.1
    config.joint.prediction_weight = 1.0  # 0: predictions are not decoded
    # GEAR's alignment of the generator's hidden states with a frozen network's features (docs/joint.md).
    config.joint.hidden_alignment = ConfigDict()
    config.joint.hidden_alignment.weight = 0.0  # 0: off; GEAR: 0.5, with next_token_weight=1
    config.joint.hidden_alignment.net = "dinov2_vitb14"  # a network of docs/losses.md, whose file is tokenizer.nets.*
    config.joint.hidden_alignment.layer = 0  # of the generator, counted from 1; 0: a third of its layers, as GEAR's
    # A hidden state is compared with the features at the code that is "predicted" from it, as GEAR's are, or at the one
    # that it has just "read".
    config.joint.hidden_alignment.position = "predicted"
    config.joint.hidden_alignment.gradient = True  # its gradient reaches encoder and codebook, as GEAR's does
    config.joint.hidden_alignment.temperature = 0.1  # of the softmax in that gradient
    config.joint.hidden_alignment.projector_channels = 2048  # hidden channels of the perceptron on the hidden states
    config.joint.init_tokenizer = ""  # the run whose weights a new run starts from; empty: random ones
    config.joint.init_generator = ""
    return config


def _fields(file: str, preset: str) -> dict[str, object]:
    return flatten(run_file(preset_folder() / file).get_config(preset))


SOURCES = {  # preset -> those that it is made of
    "openmoji32": ("openmoji32", "openmoji32"),
    "openmoji64": ("openmoji64", "openmoji64"),
    "imagenet256_16384_B": ("imagenet256_16384", "imagenet256_B"),
}
PRESETS = tuple(SOURCES)


def get_config(preset: str) -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return _joint(*SOURCES[preset])


def expected_sizes(preset: str) -> dict[str, object]:
    """Returns the number of classes that the preset is meant for; `plan` takes it, for it needs no data."""
    sizes = run_file(preset_folder() / "autoregressive.py").expected_sizes(SOURCES[preset][1])
    return {"num_classes": sizes["num_classes"]}
