"""Curves by SAE, snapshots on disk, and warnings that come when they should and not otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app import curves
from app.curves import Curve, Example, FeatureNow, Histogram, Snapshot
from app.tables import JobMetric
from app.trainspecs import SaeSpec

N = 1000


def sae(**fields: Any) -> SaeSpec:
    return SaeSpec.model_validate({"hook_name": "blocks.1.hook_resid_post", "set_name": "a", **fields})


TOPK, STANDARD = sae(d_sae=4096, k=32), sae(architecture="standard", d_sae=4096, l1_warmup_steps=50)


def healthy(n: int = 60) -> dict[str, Curve]:
    steps = [10 * (i + 1) for i in range(n)]
    return {
        "loss": [(s, 0.2 + 0.8 / (1 + s / 50)) for s in steps],
        "explained_variance": [(s, 0.8 - 0.8 / (1 + s / 50)) for s in steps],
        "l0": [(s, 32.0) for s in steps],
        "dead_fraction": [(s, 0.01) for s in steps],
    }


def flat(value: float, n: int = 60) -> Curve:
    return [(10 * (i + 1), value) for i in range(n)]


def kinds(given: dict[str, Curve], spec: SaeSpec = TOPK) -> list[str]:
    return [warning.kind for warning in curves.warnings(given, spec, N)]


@pytest.mark.parametrize("spec", [TOPK, STANDARD])
@pytest.mark.parametrize("n", [0, 1, 3, 12, 60])
def test_a_healthy_run_has_no_warnings_at_any_time(spec: SaeSpec, n: int) -> None:
    assert kinds({name: curve[:n] for name, curve in healthy().items()}, spec) == []


@pytest.mark.parametrize(
    ("spec", "changed", "kind", "advice"),
    [
        (TOPK, {"dead_fraction": flat(0.4)}, "dead", "Raise aux_k (now 256)"),
        (STANDARD, {"dead_fraction": flat(0.4)}, "dead", "Lower l1_coefficient (now 3)"),
        (TOPK, {"explained_variance": flat(0.4)}, "poor", "raise k (now 32)"),
        (STANDARD, {"explained_variance": flat(0.4)}, "poor", "lower l1_coefficient"),
        (STANDARD, {"l0": flat(900)}, "dense", "raise l1_coefficient (now 3)"),
        (STANDARD, {"l0": flat(0.2)}, "sparse", "Lower l1_coefficient"),
        (
            TOPK,
            {"loss": [*flat(0.2, 40), *((400 + 10 * i, 0.9) for i in range(8))]},
            "diverging",
            "Lower lr (now 1.0e-03)",
        ),
    ],
)
def test_each_trouble_has_its_warning_and_what_to_change(
    spec: SaeSpec, changed: dict[str, Curve], kind: str, advice: str
) -> None:
    (warning,) = curves.warnings(healthy() | changed, spec, N)
    assert warning.kind == kind
    assert advice in warning.advice


def test_a_penalty_that_wins_at_the_start_is_told_early() -> None:
    early = {"l0": flat(0.5, 5), "explained_variance": flat(0.02, 5), "loss": flat(1.0, 5)}
    (warning,) = curves.warnings(early, STANDARD, N)
    assert warning.kind == "early_penalty"
    assert "l1_warmup_steps (now 50)" in warning.advice


def test_one_bad_batch_is_no_divergence() -> None:
    assert kinds(healthy() | {"loss": [*flat(0.2, 59), (600, 5.0)]}) == []


def test_dead_latents_at_the_very_start_are_not_judged() -> None:
    assert kinds({"dead_fraction": flat(0.9, 5)}) == []


def test_curves_are_read_by_source_and_by_the_whole_job() -> None:
    rows = [
        JobMetric(job_id=1, step=10, values={"tokens": 5, "1-a/loss": 2.0, "1-b/loss": 3.0, "1-gone/loss": 1.0}),
        JobMetric(job_id=1, step=20, values={"tokens": 9, "1-a/loss": float("nan"), "1-b/loss": 2.5, "note": "x"}),
    ]
    assert curves.series(rows, ["1-a", "1-b"]) == {
        "1-a": {"tokens": [(10, 5), (20, 9)], "loss": [(10, 2.0)]},
        "1-b": {"tokens": [(10, 5), (20, 9)], "loss": [(10, 3.0), (20, 2.5)]},
    }
    single = [JobMetric(job_id=1, step=10, values={curves.key("1-a", "loss", 1): 2.0})]
    assert curves.series(single, ["1-a"]) == {"1-a": {"loss": [(10, 2.0)]}}
    assert curves.key("1-a", "loss", 2) == "1-a/loss"


def test_a_snapshot_reads_back(tmp_path: Path) -> None:
    shown = Snapshot(
        step=20,
        tokens=400,
        n_probe=100,
        activations=Histogram(edges=(-1, 0, 1), counts=(3, 4)),
        densities=Histogram(edges=(-3, -2, -1), counts=(5, 6)),
        n_silent=7,
        features=(FeatureNow(index=3, density=0.1, max_act=2.5, examples=(Example(tokens=("<b>",), values=(2.5,)),)),),
    )
    curves.write_snapshot(tmp_path, "1-a", shown)
    curves.write_snapshot(tmp_path, "1-a", shown.model_copy(update={"step": 3}))
    assert curves.snapshot_steps(tmp_path, "1-a") == (3, 20)
    assert curves.read_snapshot(tmp_path, "1-a", 20) == shown
    assert curves.snapshot_steps(tmp_path, "1-none") == ()
