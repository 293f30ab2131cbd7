"""One training in three ways of writing: a form's texts, YAML, and the whole spec. Each makes the others."""

from __future__ import annotations

from typing import Any

import pytest

from app import trainforms, trainings, yamlspec
from app.errors import BadInput
from app.protocol import ModelCard
from app.trainspecs import Architecture, SaeSpec, TrainSpec

CARD = ModelCard.model_construct(id="m", n_layers=30, d_model=576, n_heads=9, d_head=64, n_params=1, d_vocab=1)
COMMON: dict[str, Any] = {"model": "m", "corpus": "c", "hook_name": "blocks.3.hook_resid_post", "set_name": "a"}
TRANSCODER = {
    "architecture": "transcoder",
    "hook_name": "blocks.3.mlp.hook_in",
    "hook_name_out": "blocks.3.hook_mlp_out",
}
SPECS: dict[str, dict[str, Any]] = {
    "one SAE": {},
    "other values": {"d_sae": 64, "k": 4, "lr": 3e-5, "seed": 7, "dead_latents": "none", "batch_size": 512},
    "a default said": {"architecture": "standard", "lr": 1e-3, "l1_coefficient": 3},
    "a grid": {"k": [16, 32], "d_sae": [4096, 8192], "seed": [0, 1]},
    "a grid with the default": {"architecture": "jumprelu", "l0_coefficient": [0.5, 1, 2], "lr": [1e-3, 1e-4]},
    "a set that looks like a grid": {"set_name": "demo-k16", "k": 16},
    "layers": {"hook_name": ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]},
    "layers and k": {"hook_name": ["blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"], "k": [8, 16]},
    "nested widths": {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [32, 64]},
    "transcoder": TRANSCODER,
    "two transcoders": {
        "saes": [
            {**TRANSCODER, "set_name": "tc"},
            {**TRANSCODER, "hook_name": "blocks.4.mlp.hook_in", "hook_name_out": "blocks.4.hook_mlp_out"},
        ]
    },
}
FREE: dict[str, dict[str, Any]] = {
    "architectures": {"architecture": ["topk", "standard"], "k": 8},
    "kinds of hooks": {"hook_name": ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]},
    "anything": {"saes": [{"k": 8}, {"set_name": "b", "architecture": "gated", "d_sae": 64}]},
}


def spec_of(fields: dict[str, Any]) -> TrainSpec:
    return trainings.read(COMMON | fields)


@pytest.mark.parametrize("case", SPECS)
def test_form_and_yaml_make_each_other_and_the_same_spec(case: str) -> None:
    if case == "two transcoders":
        SPECS[case]["saes"][1]["set_name"] = "tc"
    spec = spec_of(SPECS[case])
    text = yamlspec.dump(trainforms.short(spec))
    fields = yamlspec.load(text)
    assert trainings.read(fields) == spec, text
    values = trainforms.to_form(fields)
    assert values is not None, text
    again = trainings.read(trainforms.from_form(values))
    assert again == spec, values
    assert yamlspec.dump(trainforms.short(again)) == text


@pytest.mark.parametrize("case", FREE)
def test_what_no_form_can_hold_still_has_its_yaml(case: str) -> None:
    spec = spec_of(FREE[case])
    fields = yamlspec.load(yamlspec.dump(trainforms.short(spec)))
    assert trainings.read(fields) == spec
    assert trainforms.to_form(fields) is None


@pytest.mark.parametrize("preset", trainforms.presets(CARD), ids=lambda preset: preset.key)
def test_every_preset_is_a_training_that_the_form_holds(preset: trainforms.Preset) -> None:
    spec = trainings.read(trainforms.from_form({**preset.values, "model": "m", "corpus": "c"}))
    values = trainforms.to_form(trainforms.short(spec))
    assert values is not None
    assert trainings.read(trainforms.from_form(values)) == spec
    assert spec.harvest_tokens > 0
    assert all(sae.layer < CARD.n_layers for sae in spec.saes)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 12])
def test_presets_fit_shallow_models_and_name_no_layer_twice(n_layers: int) -> None:
    for preset in trainforms.presets(CARD.model_copy(update={"n_layers": n_layers, "d_model": 8})):
        spec = trainings.read(trainforms.from_form({**preset.values, "model": "m", "corpus": "c"}))
        assert all(sae.layer < n_layers for sae in spec.saes)


def test_fields_of_other_architectures_that_a_form_sends_are_left_out() -> None:
    values = {"architecture": "standard", "k": "32", "l1_coefficient": "2", "layer": "1", "hook_out": "hook_mlp_out"}
    assert trainforms.from_form(values) == {
        "architecture": "standard",
        "l1_coefficient": 2,
        "hook_name": "blocks.1.hook_resid_post",
    }


def test_every_field_of_a_spec_is_one_of_the_form() -> None:
    shown = {*trainforms.FIELDS, "hook_name", "hook_name_out", "saes"}
    assert shown == {*TrainSpec.model_fields, *SaeSpec.model_fields}
    assert {f".{kind}" for kind in trainforms.HOOKS} == {f".{kind}" for kind in _hook_kinds()}


def _hook_kinds() -> set[str]:
    pattern = str(SaeSpec.model_json_schema()["properties"]["hook_name"]["pattern"])
    inner = pattern[pattern.index("(") + 1 : pattern.rindex(")")]
    return {kind.replace("\\.", ".") for kind in inner.split("|")}


def test_numbers_in_a_form_may_have_commas_and_exponents() -> None:
    fields = trainforms.from_form({"n_tokens": "2,000,000", "lr": "3e-4", "k": "16, 32", "set_name": "123"})
    assert fields == {"n_tokens": 2_000_000, "lr": 3e-4, "k": [16, 32], "set_name": "123"}


def test_yaml_writes_exponents_as_people_do_and_keeps_other_words_texts() -> None:
    assert yamlspec.load("lr: 1e-4\nset_name: e5\nk: [1, 2]") == {"lr": 1e-4, "set_name": "e5", "k": [1, 2]}


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
HOSTILE: dict[str, tuple[str, str]] = {
    "a bomb of references": (BOMB, "Line 2 refers to *a; references are not read"),
    "a merge": ("a: &a {k: 3}\nb:\n  <<: *a\n", "Line 3 refers to *a"),
    "a deep one": ("[" * 20_000, "nested more than 12 deep in line 1"),
    "deep mappings": ("{a: " * 14 + "1" + "}" * 14, "nested more than 12 deep"),
    "a large one": ("a: " + "x" * 300_000, "300,003 bytes; up to 262,144"),
    "many values": ("k: [" + "1," * 50_000 + "]", "more than 20,000 values"),
    "a key twice": ("k: 1\nd_sae: 8\nk: 2\n", "k is given twice, the second time in line 3"),
    "a key twice in an SAE": ("saes:\n- k: 1\n  k: 2\n", "k is given twice, the second time in line 3"),
    "an object": ("a: !!python/object/apply:os.system [echo]", "line 1, column 4: could not determine a constructor"),
    "a list": ("[1, 2]", "this YAML is a list"),
    "nothing": ("", "this YAML is a blank"),
    "a word": ("hello", "this YAML is a single value"),
    "no YAML": ("a: [1", "line 1, column 6"),
    "two documents": ("a: 1\n---\nb: 2\n", "but found another document"),
    "NUL": ("a: \0", "This is no YAML"),
    "a half character": ("a: \ud800", "This is no YAML"),
    "a tab": ("a:\n\tb: 1", "line 2"),
    "a list as a key": ("? [1, 2]\n: 3\n", "line 1, column 3: found unhashable key"),
    "a date that is none": ("a: 2026-13-45", "cannot be read"),
    "too many digits": ("n_tokens: " + "9" * 5_000, "cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_in_words(case: str) -> None:
    text, words = HOSTILE[case]
    with pytest.raises(BadInput) as refused:
        yamlspec.load(text)
    assert words in refused.value.message
    assert len(refused.value.message) < 400


def test_an_architecture_s_fields_are_those_that_its_form_shows() -> None:
    for architecture in Architecture:
        given = dict.fromkeys(trainforms.FIELDS, "3") | {"architecture": str(architecture), "layer": "1"}
        sent = set(trainforms.from_form(given)) & {name for other in Architecture for name in other.fields}
        assert sent | {"hook_name_out"} == set(architecture.fields) | {"lr", "dead_latents", "hook_name_out"}
