"""The training spec: one form for one SAE and for grids, and refusals in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from app.trainspecs import Architecture, SaeSpec, TrainSpec

COMMON: dict[str, Any] = {"model": "m", "corpus": "c"}
FLAT = COMMON | {"hook_name": "blocks.3.hook_resid_post", "set_name": "a"}
TRANSCODER = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}


def spec(**fields: Any) -> TrainSpec:
    return TrainSpec.model_validate(FLAT | fields)


def names(**fields: Any) -> list[str]:
    return [sae.source for sae in spec(**fields).saes]


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    return str(caught.value)


def test_a_flat_spec_is_a_job_of_one_sae() -> None:
    asked = spec(d_sae=64, k=4, seed=3)
    assert [(s.source, s.d_sae, s.k, s.seed) for s in asked.saes] == [("3-a", 64, 4, 3)]


def test_what_is_stored_with_the_job_reads_back_the_same() -> None:
    asked = spec(k=[8, 16], seed=[0, 1])
    assert TrainSpec.model_validate(asked.model_dump(mode="json")) == asked


def test_the_demo_s_spec_trains_the_demo_s_sae() -> None:
    spec = TrainSpec.model_validate(yaml.safe_load(Path("app/demo/train.yaml").read_text()))
    (sae,) = spec.saes
    assert (sae.source, sae.architecture, sae.d_sae, sae.k, sae.aux_k) == ("12-demo", "topk", 4096, 32, 256)
    assert (spec.n_tokens, spec.epochs, sae.lr, sae.treatment) == (2_600_000, 2, 0.001, "aux_k")


def test_lists_make_a_grid_whose_names_tell_the_saes_apart() -> None:
    assert names(k=[16, 32]) == ["3-a-k16", "3-a-k32"]
    assert names(architecture="standard", l1_coefficient=[0.5, 5], d_sae=[64, 128]) == [
        "3-a-l1-0p5-d64",
        "3-a-l1-0p5-d128",
        "3-a-l1-5-d64",
        "3-a-l1-5-d128",
    ]
    assert names(lr=[1e-3, 1e-4]) == ["3-a-lr0p001", "3-a-lr0p0001"]
    assert names(architecture=["topk", "standard"], k=8, l1_coefficient=2.0) == ["3-a-topk", "3-a-standard"]


def test_layers_need_no_word_and_kinds_of_hooks_do() -> None:
    layers = [f"blocks.{n}.hook_resid_post" for n in (1, 2)]
    kinds = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]
    assert [s.source for s in spec(**{"hook_name": layers}).saes] == ["1-a", "2-a"]
    assert [s.source for s in spec(**{"hook_name": kinds}).saes] == ["1-a-resid-post", "1-a-attn-z"]


def test_saes_may_differ_in_everything_and_share_what_is_given_outside() -> None:
    asked = TrainSpec.model_validate(
        COMMON
        | {
            "hook_name": "blocks.3.hook_resid_post",
            "d_sae": 64,
            "k": 8,
            "saes": [
                {"set_name": "a"},
                {"set_name": "b", "architecture": "gated", "d_sae": 32},
                {"set_name": "c", "architecture": "transcoder", **TRANSCODER},
            ],
        }
    )
    assert [(s.set_name, s.architecture, s.d_sae, s.k) for s in asked.saes] == [
        ("a", "topk", 64, 8),
        ("b", "gated", 32, None),
        ("c", "transcoder", 64, None),
    ]
    assert asked.hooks == ("blocks.3.hook_resid_post", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")


@pytest.mark.parametrize("architecture", Architecture)
def test_every_architecture_has_its_defaults_written_out(architecture: Architecture) -> None:
    more = TRANSCODER if architecture.is_transcoder else {}
    sae = SaeSpec.model_validate({"hook_name": FLAT["hook_name"], "set_name": "a", "architecture": architecture} | more)
    assert sae.treatment in ("aux_k", "resample", "pre_act")
    given = {name for name in SaeSpec.model_fields if getattr(sae, name) is not None}
    for other in Architecture:
        assert other is architecture or not (given & set(other.fields)) - set(architecture.fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architecture": "standard", "k": 8}, "k is a field of topk, batchtopk and matryoshka_batchtopk; this job"),
        ({"saes": [{"architecture": "gated", "k": 8}]}, "k is a field of topk.* this SAE is gated"),
        ({"l1_coefficient": 3}, "l1_coefficient is a field of standard, gated, .*trains topk"),
        ({"k": 64, "d_sae": 64}, "k is 64 and d_sae 64; k must be smaller"),
        ({"architecture": "transcoder"}, "hook_name_out is missing"),
        ({"architecture": "transcoder", "hook_name_out": FLAT["hook_name"]}, "hook_name itself"),
        ({"dead_latents": "resample"}, "dead_latents of topk is one of aux_k, none"),
        ({"architecture": "matryoshka_batchtopk", "matryoshka_widths": [8, 4]}, "must rise"),
        (
            {"architecture": "matryoshka_batchtopk", "d_sae": 16, "matryoshka_widths": [32], "k": 2},
            "32; d_sae is only 16",
        ),
        ({"saes": [{}, {}]}, "two SAEs would be called 3-a"),
        ({"seed": list(range(65))}, "65 SAEs; a job trains at most 64"),
        ({"saes": []}, "at least 1"),
        ({"saes": 3}, "saes"),
        ({"saes": [3]}, "saes"),
        ({"architecture": "magic"}, "batchtopk"),
        ({"hook_name": "garbage"}, "hook_name"),
        ({"hook_name": []}, "hook_name"),
        ({"lr": float("nan")}, "lr"),
        ({"nonsense": 1}, "nonsense"),
        ({"cache": "buffer", "buffer_tokens": 2048}, "fewer than 8 batches of 4,096; it must be at least 32,768"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(fields: dict[str, Any], words: str) -> None:
    assert re.search(words, refusal(**fields)), refusal(**fields)


def test_a_harvest_too_small_to_be_is_refused_before_the_training() -> None:
    with pytest.raises(ValidationError, match="harvest_tokens is 500; a harvest reads at least 1,000"):
        spec(harvest_tokens=500)
    assert spec(harvest_tokens=0).harvest_tokens == 0


def test_ghost_grads_is_understood_and_explained() -> None:
    asked = spec(architecture="standard", dead_latents="ghost_grads")
    assert asked.saes[0].treatment == "resample"
    assert "superseded" in asked.notes[0]
    assert "uses resample" in asked.notes[0]


def test_every_field_is_explained() -> None:
    for form in (SaeSpec, TrainSpec):
        for name, field in form.model_fields.items():
            assert (field.description or "").endswith((".", ")")), name


def test_a_grid_of_a_billion_saes_is_refused_before_it_is_made() -> None:
    assert "this makes 1,000,000,000 SAEs; a job trains at most 64" in refusal(
        **{name: list(range(1, 1001)) for name in ("k", "seed", "d_sae")}
    )


def test_numbers_are_finite() -> None:
    assert "finite" in refusal(architecture="standard", l1_coefficient=float("inf"))
