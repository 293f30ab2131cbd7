"""What is said of where an SAE comes from."""

from __future__ import annotations

from app import origins


def test_a_trained_sae_names_its_job_and_what_tells_runs_apart_not_every_setting() -> None:
    spec = {"corpus": "demo", "n_tokens": 2_600_000, "lr": 0.001, "seed": 0, "aux_coefficient": 0.03, "held_out": 0.05}
    shown = origins.words({"kind": "trained", "job": 2, "spec": spec})
    assert shown == (
        ("how", "trained"),
        ("job", "2"),
        ("corpus", "demo"),
        ("tokens", "2,600,000"),
        ("lr", "0.001"),
        ("seed", "0"),
    )


def test_a_fetched_sae_names_repository_commit_and_format_and_what_is_not_known_stays() -> None:
    origin = {"repo": "a/b", "revision": "0f", "format": "sparsify", "bundle": "demo", "more": {"deep": 1}}
    assert origins.words(origin) == (
        ("repository on the hub", "a/b"),
        ("commit", "0f"),
        ("format", "sparsify"),
        ("bundle", "demo"),
    )


def test_a_training_s_lineage_tells_hours_software_commit_and_company() -> None:
    shown = dict(
        origins.words(
            {
                "kind": "trained",
                "job": 7,
                "corpus": {"name": "demo", "hash": "c0ffee"},
                "hours": 0.35,
                "trained_with": {"sae-atlas": "1.0", "torch": "2.13", "commit": "abc123"},
                "together_with": ["12-a-k16", "12-a-k64"],
            }
        )
    )
    assert shown == {
        "how": "trained",
        "job": "7",
        "corpus hash": "c0ffee",
        "hours": "0.35",
        "trained with": "sae-atlas 1.0, torch 2.13",
        "commit": "abc123",
        "trained together with": "12-a-k16, 12-a-k64",
    }
