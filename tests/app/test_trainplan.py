"""The plan of a training job: every token once an epoch, and an estimate that follows from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from app.protocol import ModelCard
from app.trainplan import Speed, estimate, looks_after, measured_speed, plan
from app.trainspecs import TrainSpec

CARD = ModelCard.model_construct(
    id="m", n_layers=4, d_model=24, n_heads=3, d_head=7, d_mlp=50, d_vocab=100, n_params=40_000
)
FLAT: dict[str, Any] = {"model": "m", "corpus": "c", "set_name": "a", "hook_name": "blocks.1.hook_resid_post"}
SMALL = {"d_sae": 64, "k": 4, "context_size": 16, "batch_size": 128, "buffer_tokens": 1_024, "n_tokens": 9_000}


def spec(**fields: Any) -> TrainSpec:
    return TrainSpec.model_validate(FLAT | SMALL | fields)


@pytest.mark.parametrize("n_contexts", [9, 20, 64, 143, None])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_buffer_deals_out_every_part_of_every_shard_once_an_epoch(n_contexts: int | None, epochs: int) -> None:
    made = plan(spec(cache="buffer", epochs=epochs), CARD, 0, n_contexts)
    dealt = Counter((p.epoch, p.shard, p.number) for window in made.windows for p in window.parts)
    assert set(dealt.values()) == {1}
    assert len(dealt) == epochs * len(made.shards) * 8
    assert made.shards[-1][1] == made.n_contexts
    assert all(window.n_batches >= 1 for window in made.windows)
    starts = [window.first_step for window in made.windows]
    assert starts == [0, *(window.end for window in made.windows)][:-1]


def test_a_window_of_the_buffer_needs_few_shards() -> None:
    made = plan(spec(cache="buffer", n_tokens=90_000), CARD, 0)
    assert len(made.shards) > 30
    assert max(len({p.shard for p in window.parts}) for window in made.windows) <= 9
    assert max(w.n_batches for w in made.windows) - min(w.n_batches for w in made.windows) <= 2


def test_cached_every_epoch_is_one_window_of_all_shards() -> None:
    made = plan(spec(cache="disk", epochs=2), CARD, 0, 500)
    assert (made.n_contexts, made.n_steps) == (500, 2 * round(500 * 15 / 128))
    assert [len(w.parts) for w in made.windows] == [len(made.shards)] * 2


def test_auto_caches_what_fits_and_a_corpus_below_a_batch_gives_no_steps() -> None:
    needed = 600 * 15 * (2 * 24 + 4)
    assert plan(spec(), CARD, needed).cached
    assert not plan(spec(), CARD, needed - 1).cached
    assert plan(spec(batch_size=512, buffer_tokens=8192), CARD, needed, 30).n_steps == 0


def test_the_estimate_counts_flops_memory_and_disk_by_hand() -> None:
    found = estimate(spec(epochs=2, k=4), CARD, 10**9, Speed(forward=1e6, step=1e7))
    assert found.tokens == 600 * 15
    assert found.steps == 2 * round(9000 / 128)
    per_token = 2 * (2 * (40_000 - 2400) / 4 + 4 * 16 * 21)
    assert found.forward_flops == pytest.approx(per_token * 600 * 16)
    assert found.step_flops == pytest.approx((2 * 24 * 64 + 8 * 24 * 4) * found.steps * 128)
    assert found.seconds == pytest.approx(found.forward_flops / 1e6 + found.step_flops / 1e7)
    assert found.disk_bytes > 9000 * (2 * 24 + 4)


def test_the_model_runs_once_for_all_and_each_sae_adds_its_steps() -> None:
    one, two = estimate(spec(), CARD, 10**9), estimate(spec(seed=[0, 1]), CARD, 10**9)
    assert two.forward_flops == one.forward_flops
    assert two.step_flops == 2 * one.step_flops
    layers = estimate(spec(hook_name=["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]), CARD, 10**9)
    assert layers.forward_flops == one.forward_flops


def test_evaluation_is_estimated_for_each_sae_and_look() -> None:
    speed = Speed(forward=1.0, step=1.0)
    asked = {"n_eval_tokens": 1_600, "evaluate_every_steps": 1_000, "held_out": 0.25}
    one, two = (estimate(spec(**asked, seed=seeds), CARD, 10**9, speed) for seeds in ([0], [0, 1]))
    assert one.looks == 1
    blocks = 2 * (40_000 - 2400) / 4 + 4 * 16 * 21
    whole, coding = 4 * blocks + 2 * 24 * 100, 4 * 24 * 64
    look, once = 32 * (2 * blocks + coding) + 8 * whole, 8 * 2 * whole
    end = 200 * (2 * blocks + coding) + 100 * 3 * whole
    assert one.evaluation_seconds == pytest.approx(16 * (look + once + end))
    assert two.evaluation_seconds == pytest.approx(16 * (2 * (look + end) - 32 * 2 * blocks + once))
    often = estimate(spec(**asked | {"evaluate_every_steps": 10}), CARD, 10**9, speed)
    assert looks_after(spec(**asked | {"evaluate_every_steps": 10}), 0, often.steps) == often.looks
    assert [looks_after(spec(**asked | {"evaluate_every_steps": 10}), n, 25) for n in (9, 10, 24, 25)] == [3, 2, 1, 0]
    assert often.evaluation_seconds == pytest.approx(16 * (often.looks * look + once + end))


def test_a_finished_job_s_speed_replaces_the_guess() -> None:
    assert measured_speed([{"url": "/x"}, {"speed": {"forward": 2.0, "step": 3.0}}]) == Speed(2.0, 3.0, True)
    assert not measured_speed([{"speed": {"forward": 0, "step": 1}}, {"speed": "fast"}]).measured
