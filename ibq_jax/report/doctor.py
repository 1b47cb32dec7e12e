"""What a run's numbers say about its health, in plain words: what was seen, and what to try.

Every threshold is a rule of thumb, named here with its reason. A finding tells its figures, so that a reader can
disagree.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ml_collections import ConfigDict

from ibq_jax.report.history import History
from ibq_jax.tokenizer.quantizers import WITH_ENTROPY, WITH_TRAINED_ROWS

FALLEN = 0.8  # of its highest: a fifth of the codes that were in use are so no more
LITTLE_USED = 0.5  # published IBQ codebooks use 84% and more of their codes (arXiv 2412.02692)
UNEVEN = 0.2  # perplexity over used codes: 0.17 where a tenth of them takes nine tenths of the tokens, evenly
SATURATED = 0.9  # mean largest probability: the soft assignment's gradient falls with p (1 - p)
GAIN_DB = 0.1  # PSNR gained in the last third: 2.3% of the squared error
LOST_DB = 0.2  # PSNR below the best: 4.7% of the squared error
D_WINS, CHANCE = 0.05, 1.0  # hinge loss: 0 is a discriminator never wrong; 1 is one that always answers 0
NEAR_CHANCE = 0.02  # of hinge loss: a guess
SPIKE = 10.0  # times the median gradient norm: a guess
ALWAYS_CLIPPED = 0.9  # of the steps: then the clip sets the step's size
LEARNT_NOTHING = 0.05  # nats below the entropy of the codes' frequencies: 5% of the perplexity
MEMORISES = 0.5  # nats that training lies below validation: a perplexity 1.6 times as high
RISEN = 0.02  # nats above the lowest validation loss: 2% of the perplexity

Severity = Literal["fine", "look", "act"]


@dataclass(frozen=True)
class Finding:
    """`seen`: the figures. `advice`: what to try, empty where all is well."""

    severity: Severity
    title: str
    seen: str
    advice: str = ""


def diagnose(
    history: History, config: ConfigDict, total_steps: int, order_0: float | None = None, stopped: str = ""
) -> list[Finding]:
    """The findings of a run, the gravest first. `total_steps`: that the run is to have, 0 where that is not known;
    `order_0`: nats, the entropy of a generator's codes alone; `stopped`: why training stopped itself, if it did."""
    rules: tuple[Callable[..., Iterator[Finding]], ...]
    ended = history.last_step >= total_steps
    if config.stage == "tokenizer":
        rules = (_usage, _evenness, _saturation, _discriminator)
        findings = [finding for rule in rules for finding in rule(history, config)]
        findings += _psnr(history, ended)
    else:
        findings = [*_likelihood(history, order_0, ended), *_by_heart(history)]
    findings += [*_gradients(history, config), *_ending(history, config, total_steps, stopped), *_unread(history)]
    order = ("act", "look", "fine")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _usage(history: History, config: ConfigDict) -> Iterator[Finding]:
    if "codebook/usage" not in history:
        return
    usage = history["codebook/usage"]
    last, highest = usage.last, float(usage.values.max())
    dead = round((1 - last) * config.codebook.size)
    seen = (
        f"{last:.1%} of {config.codebook.size:,} codes in the last window of steps ({dead:,} were never chosen there), "
        f"{highest:.1%} at its highest"
    )
    advice = _more_codes(config.quantizer.name)
    if last < FALLEN * highest:
        yield Finding("act", "the codebook is collapsing", seen, advice)
    elif last < LITTLE_USED:
        yield Finding("look", "much of the codebook is idle", seen, advice)
    else:
        yield Finding("fine", "the codebook is in use", seen)


def _more_codes(quantizer: str) -> str:
    """What brought more codes into use, as far as it was measured."""
    if quantizer in WITH_ENTROPY:
        return (
            "raise loss.entropy_weight: with IBQ 0.05 kept 54% and more of 4,096 codes in use, 0 at most 25%, and a "
            "lower optimizer.learning_rate did not help (docs/collapse.md); or take a smaller codebook.size"
        )
    if quantizer in WITH_TRAINED_ROWS:
        return (
            "take quantizer.name=ibq, which used 74% of 16,384 codes where vq used 0.3% (docs/codebook_scaling.md), or "
            "a smaller codebook.size; convert --prune drops the codes that are not used"
        )
    return "take a smaller codebook.size"


def _evenness(history: History, config: ConfigDict) -> Iterator[Finding]:
    if "codebook/perplexity" not in history or "codebook/usage" not in history:
        return
    used, perplexity = history["codebook/usage"].last * config.codebook.size, history["codebook/perplexity"].last
    more = "raise loss.entropy_weight" if config.quantizer.name in WITH_ENTROPY else "take a smaller codebook.size"
    if used and perplexity < UNEVEN * used:
        yield Finding(
            "look",
            "few codes carry most of the pictures",
            f"perplexity {perplexity:,.0f} of {used:,.0f} codes in use",
            "plain backgrounds do this by themselves; else " + more,
        )


def _saturation(history: History, _: ConfigDict) -> Iterator[Finding]:
    name = "codebook/max_probability"
    if name in history and history[name].last > SATURATED:
        yield Finding(
            "look",
            "assignments are nearly certain",
            f"the likeliest code has probability {history[name].last:.2f} on average: the others get little gradient",
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
                f"{seen}, while the training error loss/l1 fell by {fell:.1%}",
                "take the best checkpoint (checkpoint.keep_best); more images, or fewer model.channels",
            )
        else:
            yield Finding(
                "look",
                "reconstructions have become worse",
                seen,
                "take the best checkpoint (checkpoint.keep_best); where a discriminator trades PSNR for looks, look",
            )
    elif gained > GAIN_DB:
        seen = f"validation PSNR rose by {gained:.2f} dB in the last third, to {psnr.last:.2f}"
        yield _improving(seen, ended)
    else:
        yield _level(f"PSNR moved by {gained:+.2f} dB in the last third, to {psnr.last:.2f}", ended)


def _training_error_since(history: History, step: int) -> float | None:
    """The share of the training error at `step` that is gone at the end: means of as many values, up to the step and
    up to the last."""
    if "loss/l1" not in history:
        return None
    error = history["loss/l1"]
    before, now = error.values[error.steps <= step], error.tail(0.1).values
    return 1 - float(np.mean(now) / np.mean(before[-len(now) :])) if before.any() else None


def _improving(seen: str, ended: bool) -> Finding:
    if not ended:
        return Finding("fine", "still improving", seen)
    return Finding(
        "look", "still improving when it ended", seen, "a larger train.steps goes on from the last checkpoint"
    )


def _level(seen: str, ended: bool) -> Finding:
    return Finding("fine", "trained to the end" if ended else "hardly moving, with steps to come", seen)


def _discriminator(history: History, config: ConfigDict) -> Iterator[Finding]:
    if "discriminator/hinge" not in history or history.last_step <= config.discriminator.start_step:
        return
    hinge = float(np.median(history["discriminator/hinge"].tail(0.25).values))
    seen = f"hinge loss {hinge:.3f} in the last quarter (0: never wrong, {CHANCE:g}: knows nothing)"
    if hinge < D_WINS:
        yield Finding(
            "act", "the discriminator wins", seen, "lower loss.adversarial_weight, or raise discriminator.start_step"
        )
    elif abs(hinge - CHANCE) < NEAR_CHANCE:
        yield Finding(
            "look",
            "the discriminator tells nothing apart",
            seen,
            "give it more steps, or raise discriminator.start_step",
        )
    else:
        yield Finding("fine", "generator and discriminator are in balance", seen)


def _gradients(history: History, config: ConfigDict) -> Iterator[Finding]:
    name = next((name for name in ("optimizer/gradient_norm", "optimizer/gradient_norm") if name in history), None)
    if name is None:
        return
    norms = history[name].tail(0.5).values
    median, largest = float(np.median(norms)), float(norms.max())
    if largest > SPIKE * median:
        yield Finding(
            "look",
            "gradients spike",
            f"the norm reached {largest:.3g}, its median is {median:.3g}",
            "set optimizer.gradient_clip near the median, or lower optimizer.learning_rate",
        )
    clip = config.optimizer.gradient_clip
    clipped = float(np.mean(norms > clip)) if clip else 0.0
    if clipped > ALWAYS_CLIPPED:
        yield Finding(
            "look",
            "nearly every gradient is clipped",
            f"{clipped:.0%} of the norms exceed optimizer.gradient_clip={clip:g}; their median is {median:.3g}",
            "the clip sets the size of a step here; raise it if training is slow",
        )


def _likelihood(history: History, order_0: float | None, ended: bool) -> Iterator[Finding]:
    if "validation/loss" not in history:
        return
    loss = history["validation/loss"]
    best = int(np.argmin(loss.values))
    if order_0 is not None and loss.last > order_0 - LEARNT_NOTHING:
        yield Finding(
            "act",
            "nothing is learnt beyond how frequent codes are",
            f"validation loss {loss.last:.3f} nats, the codes' frequencies alone give {order_0:.3f}",
            "train longer, raise optimizer.learning_rate, or check that the codes are this tokenizer's",
        )
    elif loss.last > loss.values[best] + RISEN:
        yield Finding(
            "act",
            "overfitting",
            f"validation loss was {loss.values[best]:.3f} at step {loss.steps[best]:,} and is {loss.last:.3f} now",
            "take the best checkpoint; more views in tokenize, more model.dropout, or a smaller model",
        )
    elif len(loss.steps) > 2 and float(loss.tail(1 / 3).values[0]) - loss.last > RISEN:
        fell = float(loss.tail(1 / 3).values[0]) - loss.last
        yield _improving(f"validation loss fell by {fell:.3f} nats in the last third, to {loss.last:.3f}", ended)
    elif len(loss.steps) > 2:
        yield _level(f"validation loss {loss.last:.3f} nats", ended)


def _by_heart(history: History) -> Iterator[Finding]:
    """Only once validation loss falls no more: while it does, averaged weights lag behind those that train."""
    if "loss/total" not in history or "validation/loss" not in history:
        return
    loss, training = history["validation/loss"], float(np.mean(history["loss/total"].tail(0.1).values))
    if len(loss.steps) > 2 and loss.last > loss.tail(1 / 3).values[0] - RISEN and loss.last - training > MEMORISES:
        yield Finding(
            "look",
            "training pictures are learnt by heart",
            f"training loss {training:.3f}, validation loss {loss.last:.3f} nats and falling no more",
            "more pictures or views, more model.dropout; samples may repeat what was trained on",
        )


def _ending(history: History, config: ConfigDict, total_steps: int, stopped: str) -> Iterator[Finding]:
    if stopped:
        yield Finding("act", "training stopped itself", stopped)
    elif total_steps and history.last_step < total_steps:
        seen = f"step {history.last_step:,} of {total_steps:,}"
        if config.stage == "autoregressive" or config.optimizer.drop_epochs:
            seen += ": the learning rate has not come to its end either"
        yield Finding("look", "the run has not ended", seen, "the same train command goes on")


def _unread(history: History) -> Iterator[Finding]:
    """What was logged and cannot be drawn."""
    if history.unreadable:
        seen = f"{history.unreadable} of them, left out here; a kill while a line is written does that to one"
        yield Finding("look", "lines of metrics.jsonl cannot be read", seen)
    if history.not_finite:
        seen = ", ".join(f"{name} at step {step:,}" for name, step in sorted(history.not_finite.items()))
        advice = "dtype=float32, or a lower optimizer.learning_rate"
        yield Finding("act", "numbers are not finite", seen, advice)
