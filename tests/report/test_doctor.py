"""The doctor: healthy runs, and runs with one thing wrong each."""

import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from support.small_runs import ROOT

from ibq_jax.base.config import load_config
from ibq_jax.report.doctor import diagnose
from ibq_jax.report.history import History, Series, read_history

STEPS = np.arange(10, 1010, 10)
FLAT = np.ones(100)
NOISE = np.random.default_rng(0).uniform(0.9, 1.1, 100)


@pytest.fixture(scope="module")
def tokenizer() -> ConfigDict:
    return load_config(f"{ROOT}/configs/tokenizer.py:openmoji32", [])


@pytest.fixture(scope="module")
def generator() -> ConfigDict:
    return load_config(f"{ROOT}/configs/autoregressive.py:openmoji32", [])


@pytest.fixture(scope="module")
def joint() -> ConfigDict:
    return load_config(f"{ROOT}/configs/joint.py:openmoji32", [])


def history(scalars: dict, **more) -> History:
    series = {name: Series(STEPS[: len(values)], np.asarray(values, float)) for name, values in scalars.items()}
    return History(series, {}, **more)


HEALTHY_TOKENIZER = {
    "codebook/usage": 0.9 * FLAT,
    "codebook/perplexity": 700 * FLAT,
    "codebook/max_probability": 0.3 * FLAT,
    "validation/psnr": 23 - 5 * np.exp(-np.arange(100) / 10),
    "discriminator/hinge": 0.6 * NOISE,
    "optimizer/gradient_norm": 2 * NOISE,
}
HEALTHY_GENERATOR = {
    "validation/loss": 2 + np.exp(-np.arange(100) / 10),
    "loss/total": 1.9 + np.exp(-np.arange(100) / 10),
    "optimizer/gradient_norm": 0.5 * NOISE,
}


def found(scalars: dict, config: ConfigDict, total_steps: int = 1000, **more) -> dict[str, str]:
    """Returns {title: severity} of the findings that are not fine."""
    findings = diagnose(history(scalars), config, total_steps, **more)
    return {finding.title: finding.severity for finding in findings if finding.severity != "fine"}


def test_a_healthy_tokenizer_has_no_complaint(tokenizer):
    assert found(HEALTHY_TOKENIZER, tokenizer) == {}
    titles = {finding.title for finding in diagnose(history(HEALTHY_TOKENIZER), tokenizer, 1000)}
    assert {"the codebook is in use", "trained to convergence"} < titles


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("ibq", r"raise loss\.entropy_weight, .*\(docs/collapse\.md\)"),
        ("lfq", r"raise loss\.entropy_weight, .* with IBQ.* or use a smaller codebook\.size$"),
        ("vq", r"use quantizer\.name=ibq, or simvq: .*docs/collapse\.md.* `convert --prune` removes"),
        ("vq --config.quantizer.entropy_logits=dot", r"use quantizer\.name=ibq, or simvq: "),
        ("simvq", r"use a smaller codebook\.size; quantizer\.entropy_logits=dot made "),
        ("simvq --config.quantizer.entropy_logits=dot", r"raise loss\.entropy_weight, "),
        ("fsq", r"use a smaller codebook\.size$"),
    ],
)
def test_the_advice_fits_the_quantizer(name, advice):
    config = load_config(f"{ROOT}/configs/tokenizer.py:openmoji32", f"--config.quantizer.name={name}".split())
    (finding,) = [f for f in diagnose(history({"codebook/usage": 0.3 * FLAT}), config, 1000) if "idle" in f.title]
    assert re.match(advice, finding.advice), finding.advice
    assert all((ROOT / path).is_file() for path in re.findall(r"docs/\S+\.md", finding.advice))


@pytest.mark.parametrize(
    ("wrong", "title", "severity"),
    [
        ({"codebook/usage": np.linspace(0.9, 0.3, 100)}, "the codebook is collapsing", "act"),
        ({"codebook/usage": 0.3 * FLAT}, "much of the codebook is idle", "look"),
        ({"codebook/perplexity": 90 * FLAT}, "a few codes cover most of the tokens", "look"),
        ({"codebook/max_probability": 0.97 * FLAT}, "assignments are nearly certain", "look"),
        ({"validation/psnr": np.linspace(18, 23, 100)}, "still improving when it ended", "look"),
        (
            {"validation/psnr": 23 - np.abs(np.linspace(-1, 2, 100))},
            "reconstructions have become worse",
            "look",
        ),
        ({"discriminator/hinge": 0.01 * FLAT}, "the discriminator wins", "act"),
        ({"discriminator/hinge": FLAT}, "the discriminator cannot tell real from reconstructed", "look"),
        ({"optimizer/gradient_norm": np.where(np.arange(100) == 90, 40, 2 * FLAT)}, "gradients spike", "look"),
        (
            {"validation/psnr": 23 - np.abs(np.linspace(-1, 2, 100)), "loss/l1": np.linspace(0.5, 0.1, 100)},
            "overfitting",
            "act",
        ),
        (
            {"validation/psnr": 23 - np.abs(np.linspace(-1, 2, 100)), "loss/l1": np.linspace(0.1, 0.2, 100)},
            "reconstructions have become worse",
            "look",
        ),
    ],
)
def test_one_thing_wrong_is_one_finding(tokenizer, wrong, title, severity):
    assert found(HEALTHY_TOKENIZER | wrong, tokenizer) == {title: severity}


EASIER = {"loss/next_token": np.linspace(5.0, 3.0, 100), "codebook/usage": np.linspace(0.9, 0.3, 100)}


def test_codes_that_become_easy_to_predict_have_their_own_finding(joint):
    scalars = HEALTHY_TOKENIZER | {"loss/next_token": np.linspace(5.0, 3.0, 100)}
    assert found(scalars, joint) == {}
    title = "the tokenizer makes its codes easy to predict by using few of them"
    assert found(scalars | EASIER, joint) == {title: "act"}
    (finding,) = (finding for finding in diagnose(history(scalars | EASIER), joint, 1000) if finding.title == title)
    assert "from 90.0% to 30.0%" in finding.seen and "raise joint.prediction_weight=1" in finding.advice
    assert (ROOT / "docs" / "joint.md").is_file() and "docs/joint.md" in finding.advice


@pytest.mark.parametrize(
    "changes", [{"loss/next_token": np.linspace(3.0, 5.0, 100)}, {"joint.next_token_gradient": False}]
)
def test_a_collapse_that_the_next_token_loss_does_not_explain_is_a_collapse(joint, changes):
    config = joint.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({name: changes[name] for name in changes if name.startswith("joint.")})
    scalars = HEALTHY_TOKENIZER | EASIER | {name: changes[name] for name in changes if name.startswith("loss/")}
    assert found(scalars, config) == {"the codebook is collapsing": "act"}


def test_a_clip_that_is_always_on_is_reported(tokenizer):
    config = tokenizer.copy_and_resolve_references().unlock()
    config.optimizer.gradient_clip = 0.5
    assert found(HEALTHY_TOKENIZER, config) == {"nearly every gradient is clipped": "look"}


def test_an_unfinished_run_is_reported_and_its_progress_is_no_complaint(tokenizer, generator):
    assert found(HEALTHY_TOKENIZER, tokenizer, total_steps=2000) == {"the run is not finished": "look"}
    rising = {"validation/psnr": np.linspace(18, 23, 100)}
    assert found(HEALTHY_TOKENIZER | rising, tokenizer, total_steps=2000) == {"the run is not finished": "look"}
    findings = diagnose(history(HEALTHY_GENERATOR), generator, 2000)
    assert not any("end" in finding.title for finding in findings if finding.severity == "fine")


def test_only_a_learning_rate_that_is_meant_to_fall_is_reported_as_unfinished(tokenizer, generator):
    (of_constant,), (of_falling,) = (
        [finding.seen for finding in diagnose(history(scalars), config, 2000) if "not finished" in finding.title]
        for scalars, config in ((HEALTHY_TOKENIZER, tokenizer), (HEALTHY_GENERATOR, generator))
    )
    assert "learning rate" not in of_constant and "learning rate" in of_falling


def test_why_a_run_stopped_by_itself_comes_first(tokenizer):
    reason = "step 1000: the codebook has collapsed"
    first, *others = diagnose(history(HEALTHY_TOKENIZER), tokenizer, 2000, stopped=reason)
    assert (first.severity, first.title, first.seen) == ("act", "training stopped by itself", reason)
    assert all(finding.severity == "fine" for finding in others)


def test_a_value_that_is_not_finite_is_reported_even_if_later_ones_are(tokenizer, tmp_path):
    lines = ['{"step": 1, "validation/psnr": 3.0}', '{"step": 2, "validation/psnr": NaN}', '{"step": 3, "loss/l1": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    read = read_history(tmp_path / "metrics.jsonl")
    assert read["validation/psnr"].steps.tolist() == [1]
    (finding,) = (finding for finding in diagnose(read, tokenizer, 0) if finding.severity == "act")
    assert finding.title == "scalars are not finite" and finding.seen == "validation/psnr at step 2"


def test_a_discriminator_is_not_judged_before_it_starts(tokenizer):
    config = tokenizer.copy_and_resolve_references().unlock()
    config.discriminator.start_step = 1000
    assert found(HEALTHY_TOKENIZER | {"discriminator/hinge": FLAT}, config) == {}


def test_a_healthy_generator_has_no_complaint(generator):
    assert found(HEALTHY_GENERATOR, generator, unigram_entropy=6.0) == {}


@pytest.mark.parametrize(
    ("wrong", "title", "severity"),
    [
        ({"validation/loss": 5.98 * FLAT}, "the model has learnt only how frequent each code is", "act"),
        ({"validation/loss": 2 + np.abs(np.linspace(-1, 0.5, 100))}, "overfitting", "act"),
        ({"loss/total": 1.2 * FLAT}, "the training images are being memorised", "look"),
        ({"validation/loss": np.linspace(4, 2, 100)}, "still improving when it ended", "look"),
    ],
)
def test_one_thing_wrong_in_a_generator_is_one_finding(generator, wrong, title, severity):
    wrong = wrong if "loss/total" in wrong else wrong | {"loss/total": wrong["validation/loss"]}
    assert found(HEALTHY_GENERATOR | wrong, generator, unigram_entropy=6.0) == {title: severity}


def test_the_most_severe_comes_first(tokenizer):
    wrong = {"codebook/usage": np.linspace(0.9, 0.3, 100), "codebook/max_probability": 0.97 * FLAT}
    severities = [finding.severity for finding in diagnose(history(HEALTHY_TOKENIZER | wrong), tokenizer, 1000)]
    assert severities == sorted(severities, key=("act", "look", "fine").index)


def test_an_empty_history_has_no_complaint(tokenizer, generator):
    assert found({}, tokenizer, 0) == found({}, generator, 0) == {}
