"""A preset shrunk until it trains in seconds, for the tests of the commands."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 12
SMALL = (
    "data.image_size=16",
    "data.resize=16",
    "data.batch_size=8",
    "model.resolution=16",
    "model.z_channels=16",
    "codebook.size=64",
    "codebook.dim=8",
    "quantizer.entropy_group_tokens=128",
    "discriminator.channels=8",
    "discriminator.layers=1",
    "discriminator.norm_group=2",
    f"train.steps={STEPS}",
    "log.every=1",
    "log.images_every=6",
    "evaluate.every=6",
    "evaluate.examples=24",
    "evaluate.batch_size=8",
    "checkpoint.every=4",
    "checkpoint.keep_last=2",
)


def arguments(workdir: Path, data_dir: Path, *overrides: str, preset: str = "openmoji32") -> list[str]:
    """Of the command that trains it."""
    fields = [f"--config.{field}" for field in (*SMALL, f"data.dir={data_dir}", *overrides)]
    return ["train", f"--config={ROOT}/configs/tokenizer.py:{preset}", f"--workdir={workdir}", *fields]
