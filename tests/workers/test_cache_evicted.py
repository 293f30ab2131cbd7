"""A training whose cached activations were deleted or spoilt meanwhile."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from app.settings import Settings
from app.tables import Job, JobState
from tests.workers.test_train import SPEC, context, run, settings, weights
from workers.activations import NotFinite
from workers.language_model import LanguageModel
from workers.trainer import caches, train
from workers.trainer.kinds import JobContext
from workers.trainer.learning import Diverged
from workers.trainer.train import Run

__all__ = ["settings"]  # the fixture
CACHED = SPEC | {"cache": "disk", "epochs": 3}


def _forgotten(made: JobContext) -> None:
    """What a new process does not have in memory."""
    train._readers.clear()
    train._learners.clear()
    assert made.directory.exists()


@pytest.mark.parametrize("before", ["activations 1/1", "optimise 1/7", "optimise 3/7"])
def test_a_cache_deleted_while_a_job_paused_is_made_again_with_the_same_bits(settings: Settings, before: str) -> None:
    first = context(settings, CACHED)
    run(first)
    expected = weights(first)
    second = context(settings, CACHED)
    steps = train.Train().plan(second)
    assert before in steps
    for step in steps:
        if step == before:
            shutil.rmtree(settings.data_dir / "training")
            _forgotten(second)
        train.Train().run(second, step)
    train.Train().finish(second)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())


def test_the_first_shard_made_again_sets_the_power_of_all(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.trainplan.TOKENS_PER_SHARD", 2_048)
    made = context(settings, CACHED)
    assert "activations 3/4" in train.Train().plan(made)
    whole = Run.resume(made)
    whole.norms()
    shutil.rmtree(whole.directory)
    whole.read_shard(2, "activations")
    assert all(shard.exists() for number in (0, 2) for shard in whole.shards(number).values())


def test_activations_that_became_no_numbers_on_disk_stop_the_job_at_the_step(settings: Settings) -> None:
    made = context(settings, CACHED)
    train.Train().plan(made)
    whole = Run.resume(made)
    whole.norms()
    for shard in whole.shards(0).values():
        rows = np.load(shard.file)
        rows[:] = np.inf
        np.save(shard.file, rows)
    with pytest.raises(Diverged, match=r"at step 0: the activations at blocks.1.hook_resid_post are not finite"):
        train.Train().run(made, "optimise 1/7")


def test_activations_that_are_no_numbers_are_never_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LanguageModel.read

    def spoilt(self: LanguageModel, *asked: Any, **more: Any) -> dict[str, torch.Tensor]:
        found = {hook: acts.clone() for hook, acts in read(self, *asked, **more).items()}
        for acts in found.values():
            acts[0, 3] = torch.nan
        return found

    monkeypatch.setattr(LanguageModel, "read", spoilt)
    made = context(settings, CACHED)
    train.Train().plan(made)
    with pytest.raises(NotFinite, match=r"blocks.1.hook_resid_post are not finite on \d+ of 6,\d+ tokens"):
        train.Train().run(made, "activations 1/1")
    assert not list((settings.data_dir / "training").rglob("*.npy"))


@pytest.fixture
def full(settings: Settings) -> tuple[Settings, JobContext]:
    """A running job's cache that leaves no room for another of its size, and that job."""
    first = context(settings, CACHED)
    train.Train().plan(first)
    whole = Run.resume(first)
    needed = max(int(mark.read_text()) for mark in whole.directory.glob("used-by-*"))
    return settings.model_copy(update={"cache_bytes": needed * 3 // 2}), first


def _elsewhere(settings: Settings, cache: str) -> JobContext:
    """A job on the same text in other contexts, whose cache is another one."""
    return context(settings, CACHED | {"cache": cache, "context_size": 20})


def test_a_cache_that_running_jobs_leave_no_room_for_is_refused_with_both_numbers(
    full: tuple[Settings, JobContext],
) -> None:
    settings, _ = full
    with pytest.raises(caches.NoRoom, match=r"takes 0.\d GB; of the limit of 0.\d GB running jobs use 0.\d GB"):
        train.Train().plan(_elsewhere(settings, "disk"))


def test_a_job_that_may_choose_takes_a_buffer_then(full: tuple[Settings, JobContext]) -> None:
    settings, _ = full
    assert train.Train().plan(_elsewhere(settings, "auto"))[0].startswith("window 1/")


def test_the_cache_of_a_job_that_runs_no_more_makes_room(full: tuple[Settings, JobContext]) -> None:
    settings, first = full
    Run.resume(first).read_shard(0, "activations")
    with first.sessions.begin() as session:
        session.get_one(Job, first.job_id).state = JobState.PAUSED
    assert train.Train().plan(_elsewhere(settings, "disk"))[0].startswith("activations 1/")
    assert len(list((settings.data_dir / "training").iterdir())) == 1
