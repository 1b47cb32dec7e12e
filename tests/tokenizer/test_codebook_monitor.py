"""The codebook's monitor: which codes count as used, and when a run is stopped."""

import jax.numpy as jnp
import pytest

from ibq_jax.base.loop import TrainingStopped
from ibq_jax.tokenizer.codebook_monitor import CodebookWindow, check_collapse


def test_a_code_is_used_while_a_token_inside_the_window_chose_it():
    window, seen = CodebookWindow.empty(4), []
    for step, indices in enumerate([[0, 1], [1, 1], [2, 2], [2, 2]], start=1):
        window = window.update(jnp.asarray([indices]), jnp.asarray(step), window=3)
        metrics = window.metrics(jnp.asarray(step), window=3)
        seen.append((float(metrics["codebook/usage"]), int(metrics["codebook/dead_codes"])))
    # Code 3 is never used. At step 4 the window is steps 2 to 4, and code 0 was last chosen at step 1.
    assert seen == [(0.5, 2), (0.5, 2), (0.75, 1), (0.5, 2)]


METRICS = {"codebook/max_probability": 0.5, "codebook/max_logit": 3.0, "codebook/max_norm": 1.5}


def test_collapse_is_judged_after_the_warm_up_and_under_the_floor():
    limits = {"usage_floor": 0.1, "grace_steps": 100}
    check_collapse(99, METRICS | {"codebook/usage": 0.01}, **limits)
    check_collapse(100, METRICS | {"codebook/usage": 0.1}, **limits)
    with pytest.raises(TrainingStopped, match=r"step 100: the codebook has collapsed: 1\.00% .*entropy_weight"):
        check_collapse(100, METRICS | {"codebook/usage": 0.01}, **limits)


def test_a_saturated_softmax_gets_another_advice():
    metrics = METRICS | {"codebook/usage": 0.01, "codebook/max_probability": 0.999}
    with pytest.raises(TrainingStopped, match=r"saturated.*learning_rate"):
        check_collapse(100, metrics, usage_floor=0.1, grace_steps=0)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"codebook/batch_entropy": 3.0}, r"codebook_monitor.usage_floor=10.00%; try a larger loss.entropy_weight"),
        ({"codebook/max_norm": 1.5}, r"largest code norm 1.5; this quantizer has no loss against it.*usage_floor=0"),
    ],
)
def test_quantizers_without_a_softmax_get_advice_that_they_can_follow(metrics, words):
    with pytest.raises(TrainingStopped, match=words):
        check_collapse(100, metrics | {"codebook/usage": 0.01}, usage_floor=0.1, grace_steps=0)
