"""One training in two processes (torchrun, gloo): the weights of one process, and an end in words."""

from __future__ import annotations

import json
import signal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from app import jobs
from app.settings import Settings
from app.tables import JobState
from app.trainspecs import TrainSpec
from tests.workers.test_train import context, run, settings, start, wait
from tests.workers.test_train_grid import COMMON, OWN, stored
from workers.trainer import together
from workers.trainer.kinds import JobContext
from workers.trainer.train import Run, Train

__all__ = ["settings"]  # the fixture
SAES: list[dict[str, Any]] = [
    {"architecture": "topk", "set_name": "topk", **OWN["topk"], "dead_after_tokens": 300},
    {"architecture": "standard", "set_name": "standard", **OWN["standard"], "dead_after_tokens": 300},
    {"architecture": "jumprelu", "set_name": "jumprelu", **OWN["jumprelu"], "dead_after_tokens": 300},
    {"architecture": "batchtopk", "set_name": "batchtopk", **OWN["batchtopk"], "dead_after_tokens": 300},
    {"architecture": "matryoshka_batchtopk", "set_name": "nested", **OWN["matryoshka_batchtopk"]},
]
SPEC: dict[str, Any] = COMMON | {"saes": SAES, "epochs": 2, "batch_size": 255, "precision": "float32"}


@pytest.mark.parametrize("cache", ["disk", "buffer"])
def test_two_processes_end_with_the_weights_of_one(settings: Settings, cache: str) -> None:
    """In float32 sums in another order differ by 1e-7; 46 steps of Adam make 1e-5 of that, a wrong share far more."""
    spec = SPEC | {"cache": cache, "buffer_tokens": 2_048}
    alone = context(settings, spec)
    run(alone)
    expected = stored(alone)
    both = context(settings, spec | {"processes": 2, "saes": _renamed("t")})
    assert Train().plan(both) == ["optimise together", *(f"evaluate {i}/5" for i in range(1, 6))]
    run(both)
    found = stored(both)
    for sae in SAES:
        name = sae["set_name"]
        for tensor, value in expected[f"1-{name}"].items():
            torch.testing.assert_close(found[f"1-{name}t"][tensor], value, rtol=1e-3, atol=1e-4, msg=f"{name} {tensor}")


def _renamed(end: str) -> list[dict[str, Any]]:
    return [{**sae, "set_name": sae["set_name"] + end} for sae in SAES]


def test_a_killed_trainer_takes_its_processes_along_and_the_next_goes_on(settings: Settings) -> None:
    spec = SPEC | {"processes": 2, "epochs": 60, "saes": SAES[:1]}
    whole = context(settings, spec)
    run(whole)
    expected = stored(whole)["1-topk"]
    with whole.sessions.begin() as session:
        full = TrainSpec.model_validate(spec).model_dump(mode="json")
        job_id = jobs.submit(session, settings, "train", "t", full).id
    for share in (0.1, None):
        trainer = start(settings)
        try:
            ready = _ended if share is None else partial(_past, share)
            wait(whole, job_id, ready)
        finally:
            trainer.send_signal(signal.SIGKILL)
            trainer.wait()
    with whole.sessions() as session:
        assert jobs.get(session, job_id).state == JobState.DONE, jobs.get(session, job_id).error
    for name, value in stored(whole)["1-topk"].items():
        assert torch.equal(value, expected[name]), name


def _ended(job: Any) -> bool:
    return JobState(job.state).ended


def _past(share: float, job: Any) -> bool:
    return job.status.startswith("step") and job.done > share


def test_what_stops_one_process_is_told_in_its_words(settings: Settings) -> None:
    made = _spoilt(context(settings, SPEC | {"processes": 2, "cache": "disk"}))
    with pytest.raises(together.Interrupted, match=r"at step 0: the activations at blocks.1.hook_resid_post are not"):
        Train().run(made, "optimise together")


def _spoilt(made: JobContext) -> JobContext:
    """A job whose cached activations are no numbers."""
    Train().plan(made)
    whole = Run.resume(made)
    whole.read_shard(0, "activations")
    for shard in whole.shards(0).values():
        rows = np.load(shard.file)
        rows[:] = np.nan
        np.save(shard.file, rows)
    (made.directory / "norms.json").write_text(_norms(whole))
    return made


def _norms(whole: Run) -> str:
    return json.dumps({hook: {"limit": 1e9, "mean_norm": 1.0, "mean": [0.0] * 24} for hook in whole.spec.hooks})


def test_a_batch_too_small_to_share_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValidationError, match=r"batch_size is 8, too small to be shared by 4 processes.*at least 32"):
        TrainSpec.model_validate(COMMON | {"k": 4, "set_name": "a", "batch_size": 8, "processes": 4})
