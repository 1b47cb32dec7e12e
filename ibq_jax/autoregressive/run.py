"""A generator's training run: what its config asks for, checked and put together, and what it left, restored.

Beside what every run's folder holds, `codes.json` is the manifest of the token cache that it was trained on.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.autoregressive.check import check_config
from ibq_jax.autoregressive.compile import jit_train_step
from ibq_jax.autoregressive.train import GeneratorState, Trainer
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import absolute
from ibq_jax.base.run import SavedRun, claim, train_to_the_end
from ibq_jax.base.sharding import make_mesh, process_rows
from ibq_jax.data.codes import CodeSource, check_manifest, open_codes, read_fields, training_code_batches
from ibq_jax.tokenizer.extract import fingerprint
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.run import restore_run as restore_tokenizer

CODES = "codes.json"

# Fields that a resumed run may change: they move where and how fast it runs and what it shows, not what it computes; a
# longer run has another schedule from there on.
FREE_FIELDS = (
    "codes",
    "tokenizer",
    "data.workers",
    "data.threads",
    "mesh.",
    "sample.",
    "log.",
    "evaluate.",
    "checkpoint.",
    "watch.",
    "loss.implementation",
    "loss.block_size",
    "model.remat",
    "model.attention",
    "train.steps",
    "train.epochs",
)

Evaluate = Callable[[dict], dict[str, float | np.ndarray]]
Pictures = Callable[[dict], dict[str, np.ndarray]]
TokenizerWeights = tuple[TokenizerModel, Mapping]  # a tokenizer: its model and parameters


class GeneratorStage:
    """What the loop asks of the generator (`ibq_jax.base.loop.Stage`)."""

    def __init__(self, trainer: Trainer, evaluate: Evaluate, pictures: Pictures):
        self._trainer, self._evaluate, self._pictures = trainer, evaluate, pictures

    @cached_property
    def _compiled_step(self):
        return jit_train_step(self._trainer)

    def step(self, state: GeneratorState, batch: Mapping[str, jax.Array]):
        return self._compiled_step(state, batch["codes"], batch["label"])

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        """A generator has no collapse to be watched for; what is not finite stops it in the loop."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        return (
            f"loss {metrics['loss/total']:.4f}  perplexity {metrics['loss/perplexity']:.1f}  "
            f"gradient {metrics['optimizer/gradient_norm']:.2f}"
        )

    def evaluate(self, state: GeneratorState) -> dict[str, float | np.ndarray]:
        return self._evaluate(state.averaged)

    def pictures(self, state: GeneratorState) -> dict[str, np.ndarray]:
        return self._pictures(state.averaged)


def train(
    config: ConfigDict,
    workdir: Path,
    make_evaluation: Callable[[Trainer, Mapping, TokenizerWeights | None], tuple[Evaluate, Pictures]],
    profile: range = range(0),
) -> GeneratorState:
    """Trains `config` in `workdir`, or continues what is there, to the end; returns the last state.

    `make_evaluation(trainer, manifest, tokenizer)` makes what the stage shows; without a tokenizer no pictures.
    Raises UsageError (bad input), TrainingStopped or Interrupted (see `ibq_jax.base.loop`).
    """
    workdir = absolute(workdir)
    mesh = make_mesh(config.mesh)
    check_config(config, mesh)
    source = _open_codes(config, workdir)
    steps_per_epoch = len(source) // config.data.batch_size
    if not steps_per_epoch and not config.train.steps:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is more than the {len(source)} pictures of {source}"
        )
    tokenizer = find_tokenizer(config.tokenizer, source.manifest, needed=config.model.use_pretrained_codebook)
    trainer = Trainer(config, mesh, steps_per_epoch)
    stage = GeneratorStage(trainer, *make_evaluation(trainer, source.manifest, tokenizer))
    codebook = _codebook(config, tokenizer) if config.model.use_pretrained_codebook else None
    claim(workdir, config, FREE_FIELDS)
    if jax.process_index() == 0:
        (workdir / CODES).write_text(json.dumps(source.manifest, indent=2) + "\n")

    def batches_from(step: int):
        return training_code_batches(
            source,
            batch_size=config.data.batch_size,
            seed=config.seed,
            start_step=step,
            rows=process_rows(mesh, config.data.batch_size),
            workers=config.data.workers,
            threads=config.data.threads,
        )

    def complete(state: GeneratorState) -> GeneratorState:
        return state if codebook is None else _with_codebook(state, codebook)

    return train_to_the_end(
        workdir, config, mesh, stage, trainer.create_state, batches_from, steps_per_epoch, complete, profile
    )


def restore_run(path: Path) -> tuple[Trainer, Restored, dict]:
    """The trainer, the newest whole state of a run's folder (or the state of one step's folder under its
    `checkpoints/`), and the manifest of its codes. On all devices, whatever mesh the run had; without moments.

    Raises UsageError when there is no run, or nothing saved yet.
    """
    saved = SavedRun.find(path, "autoregressive", needed="a generator")
    trainer = Trainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh), read_fields(saved.workdir / CODES)


def find_tokenizer(path: str, manifest: Mapping, needed: bool) -> TokenizerWeights | None:
    """The tokenizer that made the codes, from `path`, or where that is empty from where the manifest says it was.

    None when it is not there and not `needed`. Raises UsageError when it is another tokenizer.
    """
    made = manifest["tokenizer"]
    where = Path(path or made["path"])
    if not path and not made["path"] and needed:
        raise UsageError("which tokenizer made this imported generator's codes is not known; give --tokenizer=RUN")
    if not path and not needed and not (where / "config.json").is_file():
        print(f"no pictures: the codes' tokenizer is not in {where} any more; tell where with --config.tokenizer=RUN")
        return None
    if not path and made["step"] is not None:
        step = where / "checkpoints" / str(made["step"])
        where = step if step.is_dir() else where
    trainer, restored = restore_tokenizer(where)
    params = restored.state.ema if made["weights"] == "ema" else restored.state.params
    if made["fingerprint"]:
        check_manifest(
            {"tokenizer": {"fingerprint": made["fingerprint"]}},
            {"tokenizer.fingerprint": fingerprint(trainer.model, params)},
            where="of these codes",
            asker=f"the tokenizer in {where}",
        )
    elif trainer.model.num_codes != manifest["codes"]:
        raise UsageError(
            f"the tokenizer in {where} has {trainer.model.num_codes} codes, the generator draws {manifest['codes']}"
        )
    return trainer.model, params


def _open_codes(config: ConfigDict, workdir: Path) -> CodeSource:
    """The training codes. Raises UsageError unless they are of the config's kind, and the run's if it has begun."""
    if not config.codes:
        raise UsageError("config.codes is empty: give --config.codes=FOLDER, which tokenize wrote")
    source = open_codes(config.codes, "train")
    check_fit(config, source)
    before = read_fields(workdir / CODES) if (workdir / CODES).is_file() else {"imported": ""}
    if "imported" not in before:  # of an imported run's codes, only what the config says is known
        check_manifest(source.manifest, _identity(before), where=config.codes, asker=f"the run in {workdir}")
    return source


def check_fit(config: ConfigDict, source: CodeSource) -> None:
    """Raises UsageError unless these are codes of the kind that the config's model draws."""
    model, classes = config.model, len(source.manifest["data"]["class_names"])
    asked = {
        "model.vocabulary": (model.vocabulary, source.num_codes),
        "model.grid": (tuple(model.grid), source.grid),
        "model.num_classes": (model.num_classes, classes),
    }
    wrong = [f"{name}={value}, the codes have {has}" for name, (value, has) in asked.items() if value != has]
    if wrong:
        raise UsageError(f"{source} does not fit the config: {'; '.join(wrong)}; override the config's fields")


def _identity(manifest: Mapping) -> dict:
    """What has to stay the same for a run to go on: not where the cache lies, nor how it was sharded."""
    data = manifest["data"]
    return {
        "tokenizer": {"fingerprint": manifest["tokenizer"]["fingerprint"]},
        "data": {
            "name": data["name"],
            "class_names": data["class_names"],
            "splits": {"train": {key: data["splits"]["train"][key] for key in ("images", "views")}},
        },
        **{key: manifest[key] for key in ("preprocessing", "precision", "codes", "grid")},
    }


def _codebook(config: ConfigDict, tokenizer: TokenizerWeights) -> jax.Array:
    model, params = tokenizer
    of_quantizer = {name: jax.device_get(leaves) for name, leaves in params.items() if name == "quantize"}
    codebook = model.apply({"params": of_quantizer}, method="code_rows")
    if codebook.shape[1] != config.model.codebook_dim:
        raise UsageError(
            f"model.codebook_dim={config.model.codebook_dim}, the tokenizer's codes have {codebook.shape[1]} dimensions"
        )
    return codebook


def _with_codebook(state: GeneratorState, codebook: jax.Array) -> GeneratorState:
    """`state` with token embeddings that start at the tokenizer's codebook, where the table was before."""

    def put(params: dict) -> dict:
        table = params["tok_emb"]["embedding"]
        rows = jax.device_put(jnp.asarray(jax.device_get(codebook), table.dtype), table.sharding)
        return params | {"tok_emb": params["tok_emb"] | {"embedding": rows}}

    return state.replace(params=put(state.params), ema=None if state.ema is None else put(state.ema))
