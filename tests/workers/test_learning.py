"""A learner by itself: what a checkpoint cut off anywhere leaves, schedules, precision, when latents are resampled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.settings import Settings
from app.trainspecs import Architecture, SaeSpec
from tests.workers.test_train import context, settings
from tests.workers.test_train_grid import COMMON, OWN, stored
from workers.trainer import learning, train
from workers.trainer.kinds import JobContext
from workers.trainer.learning import Learner, learning_rate, penalty_warmth

__all__ = ["settings"]  # the fixture
D_IN = 24
BOTH = [
    {"architecture": "jumprelu", "set_name": "j", **OWN["jumprelu"]},
    {"architecture": "topk", "set_name": "k", **OWN["topk"], "dead_after_tokens": 500},
]


class Killed(BaseException):
    """The process is gone."""


def _spec(**fields: Any) -> SaeSpec:
    usual = {"hook_name": "blocks.1.hook_resid_post", "set_name": "a", "d_sae": 48, "warmup_steps": 5}
    return SaeSpec.model_validate(usual | fields)


def _data(n_rows: int, seed: int = 0) -> Tensor:
    """Sparse sums of a few directions, as activations are, of mean norm about sqrt(d)."""
    drawn = torch.Generator().manual_seed(7)
    directions = torch.randn(40, D_IN, generator=drawn)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n_rows, 40, generator=generator) < 0.08
    x = (active * torch.rand(n_rows, 40, generator=generator)) @ directions + 0.01
    return x * D_IN**0.5 / x.norm(dim=-1).mean()


@pytest.mark.parametrize("cache", ["disk", "buffer"])
def test_deaths_in_the_middle_of_every_checkpoint_change_no_bit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Half a file, a whole one under its scratch name, the first SAE's checkpoint new and the second's old."""
    spec = COMMON | {"saes": BOTH, "cache": cache, "buffer_tokens": 2_048, "epochs": 2}
    whole = context(settings, spec)
    _run(whole)
    expected = stored(whole)
    again = {**spec, "saes": [{**sae, "set_name": sae["set_name"] + "x"} for sae in BOTH]}
    made = context(settings, again)
    steps, deaths = train.Train().plan(made), Deaths()
    with monkeypatch.context() as patched:
        patched.setattr(learning, "save_file", deaths.save)
        patched.setattr(learning.os, "replace", deaths.replace)
        for step in steps:
            while True:
                try:
                    train.Train().run(made, step)
                    break
                except Killed:
                    train._learners.clear()
                    train._readers.clear()
    train.Train().finish(made)
    assert set(deaths.seen) == {"half", "unnamed", "renamed"}
    assert len(deaths.seen) >= 6
    found = stored(made)
    for name, tensors in expected.items():
        assert all(torch.equal(tensor, found[f"{name}x"][key]) for key, tensor in tensors.items()), name


class Deaths:
    """Ends the process in some saves of checkpoints: of seven in the middle of the first, third and sixth."""

    def __init__(self) -> None:
        self.n_saves = 0
        self.seen: list[str] = []

    def save(self, tensors: dict[str, Tensor], path: Path) -> None:
        _save(tensors, path)
        self.n_saves += 1
        if self.n_saves % 7 == 1:
            os.truncate(path, path.stat().st_size // 2)
            self._die("half")

    def replace(self, scratch: Path, path: Path) -> None:
        checkpoint = path.suffix == ".safetensors" and "evaluation" not in path.name
        if checkpoint and self.n_saves % 7 == 3:
            self._die("unnamed")
        _replace(scratch, path)
        if checkpoint and self.n_saves % 7 == 6:
            self._die("renamed")

    def _die(self, how: str) -> None:
        self.seen.append(how)
        raise Killed


def _run(made: JobContext) -> None:
    for step in train.Train().plan(made):
        train.Train().run(made, step)
    train.Train().finish(made)


_save, _replace = save_file, os.replace


def test_bfloat16_learns_what_float32_learns_and_keeps_weights_in_float32() -> None:
    found: dict[torch.dtype, float] = {}
    for precision in (torch.float32, torch.bfloat16):
        learner = Learner.fresh(_spec(k=4, lr=3e-3), D_IN, torch.zeros(D_IN))
        for step in range(200):
            x = _data(256, seed=step)
            told = learner.learn(x, x, 200, precision, measure=True)
            assert told is not None
            found[precision] = told["explained_variance"]
        assert {p.dtype for p in learner.weights.values()} == {torch.float32}
    assert found[torch.float32] > 0.6
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], abs=0.02)


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"])
def test_a_seed_means_the_same_bits_and_rows_of_the_decoder_keep_norm_one(architecture: str) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        more = {"k": 4} if "topk" in architecture else {}
        learner = Learner.fresh(_spec(architecture=architecture, seed=seed, **more), D_IN, torch.zeros(D_IN))
        for step in range(12):
            x = _data(64, seed=step)
            learner.learn(x, x, 12, torch.float32, measure=False)
        return {name: weight.detach() for name, weight in learner.weights.items()}

    first, same, other = trained(3), trained(3), trained(4)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["W_dec"], other["W_dec"])
    torch.testing.assert_close(first["W_dec"].norm(dim=-1), torch.ones(48))


def test_the_penalty_rises_to_its_whole_and_none_without_a_warm_up() -> None:
    spec = _spec(architecture="standard", l1_warmup_steps=4)
    assert [penalty_warmth(step, spec) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert penalty_warmth(0, _spec(architecture="jumprelu", l0_warmup_steps=0)) == 1
    assert [learning_rate(step, 10, _spec(k=4, lr=1.0, warmup_steps=0, decay_share=0.2)) for step in (0, 8, 9)] == [
        1.0,
        1.0,
        0.5,
    ]


def test_dead_latents_are_resampled_at_their_steps_and_not_in_the_last_third() -> None:
    spec = _spec(architecture="standard", resample_every_steps=10, dead_after_tokens=256, l1_coefficient=0.0)
    learner = Learner.fresh(spec, D_IN, torch.zeros(D_IN))
    revived: list[int] = []
    for step in range(30):
        with torch.no_grad():
            learner.weights["b_enc"][5] = -1e3  # dead, whatever comes
        x = _data(128, seed=step)
        learner.learn(x, x, 30, torch.float32, measure=False)
        if float(learner.weights["b_enc"][5].detach()) == 0:
            revived.append(step + 1)
    assert revived == [10, 20]


@pytest.mark.parametrize(
    "architecture", [architecture for architecture in Architecture if not architecture.is_transcoder]
)
def test_with_its_defaults_every_architecture_is_sparse_after_a_few_hundred_steps(architecture: Architecture) -> None:
    """256 latents for 200 directions, of which 6 are active, at frequencies that fall as those of features do."""
    own = {"k": 6} if architecture.chooses_k else {}
    learner = Learner.fresh(_spec(architecture=architecture, d_sae=256, **own), 128, torch.zeros(128))
    told = None
    for step in range(300):
        x = _superposed(128, seed=step)
        told = learner.learn(x, x, 300, torch.float32, measure=True)
    assert told is not None
    assert told["l0"] < 0.3 * 256
    assert told["explained_variance"] > 0.4
    assert told["dead_fraction"] == 0


def _superposed(n_rows: int, seed: int) -> Tensor:
    drawn, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed + 1)
    directions = torch.nn.functional.normalize(torch.randn(200, 128, generator=drawn), dim=-1)
    frequency = torch.arange(1, 201) ** -0.7
    active = torch.rand(n_rows, 200, generator=generator) < frequency * (6 / frequency.sum())
    sizes = 0.5 + torch.rand(n_rows, 200, generator=generator)
    x = (active * sizes) @ directions + 0.02 * torch.randn(n_rows, 128, generator=generator)
    return x * (128**0.5 / 2.4)
