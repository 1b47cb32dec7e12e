"""Diagnosis of a run from the scalars it logged, in plain words: what was seen, and what to try.

Every threshold is a rule of thumb, defined here with its reason. A finding states its figures, so that readers can
judge for themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ml_collections import ConfigDict

from ibq_jax.joint.parts import tokenizer_part
from ibq_jax.report.history import History
from ibq_jax.tokenizer.quantizers import has_entropy_loss

FALLEN = 0.8  # of its peak: usage fell by a fifth
LITTLE_USED = 0.5  # published IBQ codebooks use 84% and more of their codes (arXiv 2412.02692)
UNEVEN = 0.2  # perplexity / codes in use; it is 0.17 if a tenth of those codes evenly covers nine tenths of the tokens
SATURATED = 0.9  # mean largest probability p: the gradient of the soft assignment scales with p (1 - p)
GAIN_DB = 0.1  # PSNR gained in the last third: 2.3% of the squared error
LOST_DB = 0.2  # PSNR below the best: 4.7% of the squared error
D_WINS, CHANCE = 0.05, 1.0  # hinge loss: 0 if the discriminator is always right, 1 if it always answers 0
NEAR_CHANCE = 0.02  # of hinge loss; a guess
SPIKE = 10.0  # times the median gradient norm; a guess
ALWAYS_CLIPPED = 0.9  # of the steps: beyond this, the clip determines the step size
LEARNT_NOTHING = 0.05  # nats below the unigram entropy of the codes: 5% of the perplexity
MEMORISES = 0.5  # nats by which training loss is below validation loss: a factor of 1.6 in perplexity
RISEN = 0.02  # nats above the lowest validation loss: 2% of the perplexity

Severity = Literal["fine", "look", "act"]


@dataclass(frozen=True)
class Finding:
    """One observation: its title, the figures behind it (`seen`), and what to try (`advice`; empty if all is well)."""

    severity: Severity
    title: str
    seen: str
    advice: str = ""


def diagnose(
    history: History, config: ConfigDict, total_steps: int, unigram_entropy: float | None = None, stopped: str = ""
) -> list[Finding]:
    """Returns the findings of a run, the most severe first.

    Args:
        history: what the run logged.
        config: its config.
        total_steps: the number of steps it is meant to train; 0 if that is not known.
        unigram_entropy: of a generator's validation codes, in nats; None if that is not known.
        stopped: the reason that training gave if it stopped by itself.
    """
    rules: tuple[Callable[..., Iterator[Finding]], ...]
    ended = history.last_step >= total_steps
    part = tokenizer_part(config) if config.stage == "joint" else config
    if config.stage == "autoregressive":
        findings = [*_likelihood(history, unigram_entropy, ended), *_memorising(history)]
    else:
        hacked = list(_easy_codes(history, config)) if config.stage == "joint" else []
        rules = (_evenness, _saturation, _discriminator) if hacked else (_usage, _evenness, _saturation, _discriminator)
        findings = hacked + [finding for rule in rules for finding in rule(history, part)]
        findings += _psnr(history, ended)
    findings += [*_gradients(history, part), *_ending(history, config, total_steps, stopped), *_unread(history)]
    order = ("act", "look", "fine")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _usage(history: History, config: ConfigDict) -> Iterator[Finding]:
    if "codebook/usage" not in history:
        return
    usage = history["codebook/usage"]
    last, highest = usage.last, float(usage.values.max())
    dead = round((1 - last) * config.codebook.size)
    seen = (
        f"{last:.1%} of {config.codebook.size:,} codes were used in the last window of steps ({dead:,} were not); "
        f"the peak was {highest:.1%}"
    )
    advice = _advice_on_usage(config.quantizer)
    if last < FALLEN * highest:
        yield Finding("act", "the codebook is collapsing", seen, advice)
    elif last < LITTLE_USED:
        yield Finding("look", "much of the codebook is idle", seen, advice)
    else:
        yield Finding("fine", "the codebook is in use", seen)


def _easy_codes(history: History, config: ConfigDict) -> Iterator[Finding]:
    """Reports what EOSTok saw under the next-token loss alone: usage falls, and the loss with it (arXiv 2605.00503)."""
    if "codebook/usage" not in history or "loss/next_token" not in history or not config.joint.next_token_gradient:
        return
    usage, loss = history["codebook/usage"], history["loss/next_token"]
    peak = int(usage.steps[np.argmax(usage.values)])
    before, now = loss.values[loss.steps <= peak], float(np.mean(loss.tail(0.1).values))
    if usage.last >= FALLEN * float(usage.values.max()) or not before.size or now >= before[-1]:
        return
    raise_it = f"raise joint.prediction_weight={config.joint.prediction_weight:g}, the remedy of EOSTok"
    yield Finding(
        "act",
        "the tokenizer makes its codes easy to predict by using few of them",
        f"since step {peak:,} the share of codes in use fell from {usage.values.max():.1%} to {usage.last:.1%} while "
        f"the next-token loss fell from {before[-1]:.3f} to {now:.3f} nats",
        f"{raise_it}; lower joint.next_token_weight={config.joint.next_token_weight:g}; or set "
        "joint.next_token_gradient=False (docs/joint.md)",
    )


def _advice_on_usage(quantizer: ConfigDict) -> str:
    """Returns what brought more codes into use in the studies of docs/."""
    if quantizer.name == "vq":
        return (
            "use quantizer.name=ibq, or simvq: vq lost nearly all codes with an entropy loss and without "
            "(docs/collapse.md); or a smaller codebook.size; `convert --prune` removes unused codes"
        )
    if has_entropy_loss(quantizer):
        return (
            "raise loss.entropy_weight, which mattered most with IBQ, while a lower optimizer.learning_rate did not "
            "help (docs/collapse.md); or use a smaller codebook.size"
        )
    if quantizer.name == "simvq":
        return (
            "use a smaller codebook.size; quantizer.entropy_logits=dot made the use more even but brought no more "
            "codes into use, and cost PSNR (docs/collapse.md)"
        )
    return "use a smaller codebook.size"


def _evenness(history: History, config: ConfigDict) -> Iterator[Finding]:
    if "codebook/perplexity" not in history or "codebook/usage" not in history:
        return
    used, perplexity = history["codebook/usage"].last * config.codebook.size, history["codebook/perplexity"].last
    more = "raise loss.entropy_weight" if has_entropy_loss(config.quantizer) else "use a smaller codebook.size"
    if used and perplexity < UNEVEN * used:
        yield Finding(
            "look",
            "a few codes cover most of the tokens",
            f"the perplexity is {perplexity:,.0f} with {used:,.0f} codes in use",
            "images with plain backgrounds cause this too; otherwise " + more,
        )


def _saturation(history: History, _: ConfigDict) -> Iterator[Finding]:
    name = "codebook/max_probability"
    if name in history and history[name].last > SATURATED:
        yield Finding(
            "look",
            "assignments are nearly certain",
            f"the most likely code has a mean probability of {history[name].last:.2f}; the others get little gradient",
            "lower optimizer.learning_rate, or raise loss.entropy_weight",
        )


def _psnr(history: History, ended: bool) -> Iterator[Finding]:
    name = "validation/psnr"
    if name not in history or len(history[name].steps) < 3:
        return
    psnr = history[name]
    best = int(np.argmax(psnr.values))
    gained = psnr.last - float(psnr.tail(1 / 3).values[0])
    if psnr.values[best] - psnr.last > LOST_DB:
        step = int(psnr.steps[best])
        seen = f"validation PSNR was {psnr.values[best]:.2f} dB at step {step:,} and is {psnr.last:.2f} dB now"
        fell = _training_error_since(history, step)
        if fell is not None and fell > 0:
            yield Finding(
                "act",
                "overfitting",
                f"{seen}, while the training loss/l1 fell by {fell:.1%}",
                "use the best checkpoint (checkpoint.keep_best), more images, or fewer model.channels",
            )
        else:
            yield Finding(
                "look",
                "reconstructions have become worse",
                seen,
                "use the best checkpoint (checkpoint.keep_best), but look at the reconstructions: a discriminator may "
                "trade PSNR for sharper images",
            )
    elif gained > GAIN_DB:
        seen = f"validation PSNR rose by {gained:.2f} dB in the last third, to {psnr.last:.2f}"
        yield _improving(seen, ended)
    else:
        yield _level(f"PSNR moved by {gained:+.2f} dB in the last third, to {psnr.last:.2f}", ended)


def _training_error_since(history: History, step: int) -> float | None:
    """Returns by which share loss/l1 fell from `step` to the end, comparing the means of equally many values that end
    at each; None if it was not logged."""
    if "loss/l1" not in history:
        return None
    error = history["loss/l1"]
    before, now = error.values[error.steps <= step], error.tail(0.1).values
    return 1 - float(np.mean(now) / np.mean(before[-len(now) :])) if before.any() else None


def _improving(seen: str, ended: bool) -> Finding:
    if not ended:
        return Finding("fine", "still improving", seen)
    return Finding(
        "look",
        "still improving when it ended",
        seen,
        "raise train.steps and repeat the train command: it continues from the last checkpoint",
    )


def _level(seen: str, ended: bool) -> Finding:
    return Finding("fine", "trained to convergence" if ended else "level, with steps to come", seen)


def _discriminator(history: History, config: ConfigDict) -> Iterator[Finding]:
    if "discriminator/hinge" not in history or history.last_step <= config.discriminator.start_step:
        return
    hinge = float(np.median(history["discriminator/hinge"].tail(0.25).values))
    seen = f"the hinge loss was {hinge:.3f} in the last quarter (0: always right, {CHANCE:g}: no better than chance)"
    if hinge < D_WINS:
        yield Finding(
            "act", "the discriminator wins", seen, "lower loss.adversarial_weight, or raise discriminator.start_step"
        )
    elif abs(hinge - CHANCE) < NEAR_CHANCE:
        yield Finding(
            "look",
            "the discriminator cannot tell real from reconstructed",
            seen,
            "give it more steps, or raise discriminator.start_step",
        )
    else:
        yield Finding("fine", "autoencoder and discriminator are in balance", seen)


def _gradients(history: History, config: ConfigDict) -> Iterator[Finding]:
    name = "optimizer/gradient_norm"
    if name not in history:
        return
    norms = history[name].tail(0.5).values
    median, largest = float(np.median(norms)), float(norms.max())
    if largest > SPIKE * median:
        yield Finding(
            "look",
            "gradients spike",
            f"the gradient norm reached {largest:.3g}; its median is {median:.3g}",
            "set optimizer.gradient_clip near the median, or lower optimizer.learning_rate",
        )
    clip = config.optimizer.gradient_clip
    clipped = float(np.mean(norms > clip)) if clip else 0.0
    if clipped > ALWAYS_CLIPPED:
        yield Finding(
            "look",
            "nearly every gradient is clipped",
            f"{clipped:.0%} of the norms exceed optimizer.gradient_clip={clip:g}; their median is {median:.3g}",
            "the clip determines the step size here; raise it if training is slow",
        )


def _likelihood(history: History, unigram_entropy: float | None, ended: bool) -> Iterator[Finding]:
    if "validation/loss" not in history:
        return
    loss = history["validation/loss"]
    best = int(np.argmin(loss.values))
    if unigram_entropy is not None and loss.last > unigram_entropy - LEARNT_NOTHING:
        yield Finding(
            "act",
            "the model has learnt only how frequent each code is",
            f"the validation loss is {loss.last:.3f} nats; the unigram entropy of the codes is {unigram_entropy:.3f}",
            "train longer, raise optimizer.learning_rate, or check that the token cache was made by this tokenizer",
        )
    elif loss.last > loss.values[best] + RISEN:
        yield Finding(
            "act",
            "overfitting",
            f"the validation loss was {loss.values[best]:.3f} at step {loss.steps[best]:,} and is {loss.last:.3f} now",
            "use the best checkpoint, more crops in tokenize (--views), more model.dropout, or a smaller model",
        )
    elif len(loss.steps) > 2 and float(loss.tail(1 / 3).values[0]) - loss.last > RISEN:
        fell = float(loss.tail(1 / 3).values[0]) - loss.last
        yield _improving(f"the validation loss fell by {fell:.3f} nats in the last third, to {loss.last:.3f}", ended)
    elif len(loss.steps) > 2:
        yield _level(f"the validation loss is {loss.last:.3f} nats", ended)


def _memorising(history: History) -> Iterator[Finding]:
    """Applies only once validation loss has stopped falling: until then the averaged weights, which validation
    uses, lag behind the raw ones."""
    if "loss/total" not in history or "validation/loss" not in history:
        return
    loss, training = history["validation/loss"], float(np.mean(history["loss/total"].tail(0.1).values))
    if len(loss.steps) > 2 and loss.last > loss.tail(1 / 3).values[0] - RISEN and loss.last - training > MEMORISES:
        yield Finding(
            "look",
            "the training images are being memorised",
            f"the training loss is {training:.3f} nats; the validation loss is {loss.last:.3f} and no longer falls",
            "use more images or crops, or more model.dropout; samples may repeat training images",
        )


def _ending(history: History, config: ConfigDict, total_steps: int, stopped: str) -> Iterator[Finding]:
    if stopped:
        yield Finding("act", "training stopped by itself", stopped)
    elif total_steps and history.last_step < total_steps:
        seen = f"step {history.last_step:,} of {total_steps:,}"
        if config.stage != "tokenizer" or config.optimizer.drop_epochs:
            seen += "; the learning rate has not reached its final value either"
        yield Finding("look", "the run is not finished", seen, "repeat the train command to continue")


def _unread(history: History) -> Iterator[Finding]:
    """Reports logged lines and values that cannot be drawn."""
    if history.unreadable:
        seen = f"left out: {history.unreadable} of them (a kill while writing damages one line)"
        yield Finding("look", "lines of metrics.jsonl cannot be read", seen)
    if history.not_finite:
        seen = ", ".join(f"{name} at step {step:,}" for name, step in sorted(history.not_finite.items()))
        advice = "use dtype=float32, or a lower optimizer.learning_rate"
        yield Finding("act", "scalars are not finite", seen, advice)
