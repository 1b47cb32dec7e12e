"""Joint runs: they resume to the bit, start from two runs, and leave two runs that every command knows."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support.generator_runs import logged, refused
from support.small_runs import joint_arguments, save_run

from ibq_jax import Generator, Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.token_cache import read_run_manifest
from ibq_jax.joint.step import JointTrainer
from ibq_jax.training.joint import started_from_runs

pytestmark = pytest.mark.slow

SHORT = (
    "tokenizer.model.channel_multipliers=(1,)",
    "tokenizer.data.image_size=8",
    "tokenizer.data.resize=8",
    "tokenizer.loss.perceptual_weight=0.0",
    "tokenizer.discriminator.norm_group=0",
    "evaluate.examples=8",
    "evaluate.every=4",
    "log.images_every=4",
    "checkpoint.every=2",
    "checkpoint.keep_last=9",
    "train.steps=4",
    "joint.hidden_alignment.weight=0.5",
    "joint.hidden_alignment.net=efficientnet",
    "joint.hidden_alignment.projector_channels=16",
)


def saved_state(run: Path, step: int):
    saved = SavedRun.find(run / "checkpoints" / str(step))
    trainer = JointTrainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return jax.device_get(saved.restore(trainer.create_state, trainer.mesh, with_optimizer=True).state)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """Four steps on eight devices."""
    folder = tmp_path_factory.mktemp("runs") / "joint"
    assert main(joint_arguments(folder, data_dir, *SHORT)) == 0
    return folder


def test_a_resumed_run_ends_at_the_same_bits(run, data_dir, tmp_path):
    """A copy with the checkpoint of step 2 goes on from there."""
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=lambda _, names: {"tokenizer", "generator", "4"} & set(names))
    assert main(joint_arguments(again, data_dir, *SHORT)) == 0
    jax.tree.map(np.testing.assert_array_equal, saved_state(again, 4), saved_state(run, 4))


def test_it_logs_both_stages(run):
    rows = logged(run)
    steps = {row["step"]: row for row in rows if "loss/next_token" in row}
    assert steps.keys() == {1, 2, 3, 4}
    assert {"loss/l1", "loss/prediction", "codebook/gradient_norm_hidden_alignment"} <= steps[1].keys()
    measured = next(row for row in rows if "validation/psnr" in row)
    assert 0 < measured["validation/next_token"] < 2 * np.log(64)
    assert measured["validation/next_token_relative"] == pytest.approx(
        measured["validation/next_token"] / measured["validation/entropy"]
    )


def test_both_parts_are_runs_that_the_python_api_loads(run):
    tokenizer, generator = Tokenizer.load(run / "tokenizer"), Generator.load(run / "generator")
    codes = np.asarray(generator.sample(np.array([0, 1]), seed=0))
    assert codes.shape == (2, 8, 8) and codes.max() < 64
    assert tokenizer.decode(codes).shape == (2, 8, 8, 3)
    jax.tree.map(np.testing.assert_array_equal, tokenizer.params, saved_state(run, 4).tokenizer.ema)


def test_commands_know_both_parts(run, data_dir, tmp_path, capsys):
    assert main(["sample", f"--run={run / 'generator'}", "--labels=0,1", f"--out={tmp_path / 'samples.png'}"]) == 0
    for part in ("tokenizer", "generator"):
        file = tmp_path / f"{part}.safetensors"
        assert main(["convert", f"--in={run / part}", f"--out={file}"]) == 0 and file.is_file()
    codes = tmp_path / "codes"
    arguments = [f"--tokenizer={run / 'tokenizer'}", f"--out={codes}", "--splits=train[:16],validation[:8]"]
    assert main(["tokenize", *arguments]) == 0
    assert main(["evaluate", f"--run={run / 'generator'}", f"--token-cache={codes}"]) == 0


def test_the_generators_run_knows_the_images_that_samples_are_compared_with(run, data_dir):
    data = read_run_manifest(run / "generator")["data"]
    source = open_split(data["name"], data["dir"], data["splits"]["train"]["source"])
    assert len(source) == len(open_split("openmoji", data_dir, "train"))


@pytest.mark.parametrize("part", ["generator", ""])
def test_reports(run, part):
    assert main(["report", f"--workdir={run / part}"]) == 0
    page = (run / part / "report.html").read_text()
    assert "Samples by class" in page
    assert part or ("Gradient norms at the codebook" in page and "Next-token loss, nats per code" in page)


def test_the_joint_run_itself_names_its_part(run, tmp_path, capsys):
    words = refused(["sample", f"--run={run}", f"--out={tmp_path / 'samples.png'}"], capsys)
    assert f"is a run of stage 'joint'; this needs a generator; {run / 'generator'} is one" in words


def test_another_tokenizer_is_refused_for_the_generator(run, data_dir, tmp_path, capsys):
    other = save_run(tmp_path / "other", data_dir)
    words = ["sample", f"--run={run / 'generator'}", f"--tokenizer={other}", f"--out={tmp_path / 'samples.png'}"]
    assert "fingerprint" in refused(words, capsys)


def test_a_joint_run_starts_from_two_runs(run, data_dir, tmp_path):
    start = saved_state(run, 4)
    trainer = JointTrainer(SavedRun.find(run).config, make_mesh({"data": -1}), steps_per_epoch=1)
    shapes, shardings = abstract_state(trainer.create_state, trainer.mesh, 0)
    empty = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), shardings)
    config = trainer.config.copy_and_resolve_references().unlock()
    config.joint.init_tokenizer, config.joint.init_generator = str(run / "tokenizer"), str(run / "generator")
    state = jax.device_get(started_from_runs(empty, config))
    for part in ("tokenizer", "generator"):
        for kept in ("params", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(getattr(state, part), kept), getattr(start, part).ema)
    ours, theirs = state.tokenizer.discriminator, start.tokenizer.discriminator
    jax.tree.map(np.testing.assert_array_equal, (ours.params, ours.batch_stats), (theirs.params, theirs.batch_stats))
    config.joint.init_tokenizer = str(save_run(tmp_path / "other", data_dir))
    with pytest.raises(UsageError, match=r"the initial weights are of another model than the config"):
        started_from_runs(empty, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            ["joint.next_token_weight=0.0"],
            "joint.next_token_weight=0.0 is not positive; joint.next_token_gradient",
        ),
        (["joint.prediction_weight=-1.0"], "joint.prediction_weight=-1.0 is negative"),
        (["tokenizer.quantizer.name=vq"], "need tokenizer.quantizer.name=ibq; with vq set them to False and 0"),
        (["joint.hidden_alignment.weight=-1.0"], "joint.hidden_alignment.weight=-1.0 is negative; 0 switches it off"),
        (["joint.hidden_alignment.net=vgg16"], "joint.hidden_alignment.net=vgg16 is not one of efficientnet, conv"),
        (
            ["joint.hidden_alignment.position=last"],
            "joint.hidden_alignment.position=last is not one of read, predicted",
        ),
        (
            ["joint.hidden_alignment.layer=3"],
            "joint.hidden_alignment.layer=3 is not one of the generator's layers, 1 to 2",
        ),
        (["joint.hidden_alignment.temperature=0.0"], "joint.hidden_alignment.temperature=0.0 is not positive"),
        (
            ["joint.hidden_alignment.projector_channels=0"],
            "joint.hidden_alignment.projector_channels=0 is not positive",
        ),
        (
            [
                *("joint.next_token_gradient=false", "joint.prediction_weight=0.0"),
                "tokenizer.quantizer.name=vq",
            ],
            "joint.hidden_alignment.gradient needs tokenizer.quantizer.name=ibq; with vq set it to False",
        ),
        (["train.grad_accum_steps=3"], "data.batch_size=8 does not divide over 8 devices times 3 micro-batches"),
        (["generator.model.use_pretrained_codebook=true"], "generator.model.use_pretrained_codebook=True is for stage"),
        (["generator.model.vocab_size=32"], "generator.model.vocab_size=32, but tokenizer and data set have 64"),
        (
            ["generator.model.num_heads=3"],
            "generator.model.embed_dim=32 does not divide into generator.model.num_heads=3",
        ),
        (["generator.model.remat=all"], "generator.model.remat=all is not one of none"),
        (["generator.dtype=float16"], "generator.dtype=float16 is not one of float32"),
        (["tokenizer.codebook.size=-4"], "tokenizer.codebook.size=-4 is not positive"),
        (["tokenizer.dtype=float16"], "tokenizer.dtype=float16 is not one of float32"),
        (["tokenizer.discriminator.name=gan"], "tokenizer.discriminator.name=gan is not one of patch"),
        (
            ["tokenizer.codebook.block_size=24"],
            "tokenizer.codebook.size=64 does not divide over mesh.codebook=1 in blocks of tokenizer.codebook.block",
        ),
        (
            ["tokenizer.loss.adversarial_weight=0.0", "tokenizer.finetune.discriminator_warmup_steps=2"],
            "tokenizer.finetune.discriminator_warmup_steps needs a discriminator, and tokenizer.loss.adversarial",
        ),
        (
            ["tokenizer.discriminator.name=dino", "tokenizer.discriminator.net=dino_vits16"],
            "tokenizer.discriminator.net=dino_vits16 is needed, but",
        ),
        (["tokenizer.nets.efficientnet=no", "tokenizer.loss.features_weight=1.0"], "tokenizer.nets.efficientnet is no"),
        (
            [
                *("joint.next_token_gradient=false", "joint.prediction_weight=0.0"),
                *("tokenizer.quantizer.name=lfq", "tokenizer.codebook.size=48"),
            ],
            "tokenizer.codebook.size=48: quantizer lfq takes powers of two",
        ),
        (["codebook.size=4"], "did you mean tokenizer.codebook.size"),
        (["joint.init_tokenizer=nowhere"], "nowhere/config.json does not exist"),
    ],
)
def test_bad_input_is_one_line(fields, message, data_dir, tmp_path, capsys):
    assert message in refused(joint_arguments(tmp_path / "run", data_dir, *SHORT, *fields), capsys)


def test_init_is_for_one_stage(data_dir, tmp_path, capsys):
    words = [*joint_arguments(tmp_path / "run", data_dir, *SHORT), "--init=somewhere"]
    assert "joint.init_tokenizer and joint.init_generator" in refused(words, capsys)
