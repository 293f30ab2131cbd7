"""SAELens' model kwargs: activations, SAE and effects against transformer-lens loaded with them and sae-lens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel

from app import formats, model_kwargs, weights
from app.errors import BadFile
from app.protocol import Operation, SaeQuery, SaeRef, SteerDirection, Target
from app.settings import Settings
from tests.tiny import TEXT, save_tiny_model
from workers.checkpoints import load_sae, save_sae
from workers.gpu import attribution
from workers.gpu.encoding import Text, encode
from workers.gpu.interventions import Applied, edits, intervention
from workers.install_model import install
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.sae.stats import ReconstructionStats

N_LAYERS, D_MODEL, N_HEADS, N_CTX, D_SAE = 3, 24, 4, 96, 31
CENTRED = {"center_writing_weights": True}
RESID = "blocks.1.hook_resid_post"
STEERED = [(Operation.ORTHOGONAL, -2.0), (Operation.CAP, -9.0), (Operation.CLAMP, 9.0), (Operation.SCALE, 3.0)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("gpt2")
    save_tiny_model(directory / "hf")
    (directory / "hf" / "model.safetensors").unlink()
    torch.manual_seed(3)
    hf = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_CTX)
    )
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.1)  # means over d_model that are not 0
    hf.save_pretrained(directory / "hf")
    install("directory", str(directory / "hf"), "gpt2", "gpt2", directory)
    return LanguageModel.load(directory / "gpt2")


def theirs(ours: LanguageModel, **kwargs: bool) -> HookedTransformer:
    """What HookedTransformer.from_pretrained_no_processing(..., **kwargs) makes of the same weights."""
    config = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=N_CTX,
        d_head=D_MODEL // N_HEADS,
        n_heads=N_HEADS,
        d_mlp=4 * D_MODEL,
        d_vocab=300,
        act_fn="gelu_new",
        eps=1e-5,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    model = HookedTransformer(config)
    off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(convert_gpt2_weights(ours.hf, config), **{**off, **kwargs})
    model.set_use_hook_mlp_in(True)
    return model


def sae(
    directory: Path, kwargs: dict[str, bool], architecture: str = "standard", **more: Any
) -> tuple[Coder, SAE[Any]]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    metadata = {"hook_name": more.pop("hook_name", RESID), "model_from_pretrained_kwargs": kwargs}
    config = {
        "architecture": architecture,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    save_sae(directory, config | more, made)
    return load_sae(directory), SAE.load_from_disk(str(directory))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = max(float(b.abs().max()), 1e-9)
    torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)


def ids(ours: LanguageModel) -> torch.Tensor:
    return torch.tensor([ours.to_ids(TEXT)[:23], ours.to_ids(TEXT[40:])[:23]])


def names(ours: LanguageModel) -> list[str]:
    return [f"blocks.{layer}.{kind}" for layer in range(N_LAYERS) for kind in ours.hook_kinds()]


def cached(model: HookedTransformer, tokens: torch.Tensor, name: str) -> torch.Tensor:
    """Activations at a hook. HookedTransformer has none on the input of the MLP, so its module is asked."""
    read: list[torch.Tensor] = []
    mlp = model.blocks[int(name.split(".")[1])].mlp
    with mlp.register_forward_pre_hook(lambda _module, args: read.append(args[0])):
        _, cache = model.run_with_cache(tokens)
    return (read[0] if name.endswith("mlp.hook_in") else cache[name]).reshape(*tokens.shape, -1)


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_centred_sae_has_the_activations_and_errors_of_sae_lens_at_every_hook(
    ours: LanguageModel, tmp_path: Path, normalise: str
) -> None:
    """The claim of gpt2-small-res-jb: the numbers of sae-lens on a model loaded with center_writing_weights."""
    model, tokens = theirs(ours, **CENTRED), ids(ours)
    for name in names(ours):
        coder, reference = sae(tmp_path, CENTRED, hook_name=name, normalize_activations=normalise)
        acts = ours.read(tokens, [name])[name].flatten(0, 1)
        wanted = cached(model, tokens, name).flatten(0, 1)
        with torch.no_grad():
            close(coder.encode(acts), reference.encode(wanted))
            close(coder.predict(acts), reference(wanted))
            close(coder.error(acts), wanted - reference(wanted))
        some = torch.tensor([4, 0, 17])
        close(coder.encode_latents(acts, some), coder.encode(acts)[:, some])


def test_without_the_centring_its_numbers_would_be_others(ours: LanguageModel, tmp_path: Path) -> None:
    tokens = ids(ours)
    plain, _ = sae(tmp_path / "plain", {})
    centred, _ = sae(tmp_path / "centred", CENTRED)
    acts = ours.read(tokens, [RESID])[RESID].flatten(0, 1)
    assert float((plain.encode(acts) - centred.encode(acts)).abs().max()) > 0.1


def test_its_metrics_are_about_the_activations_it_was_trained_on(ours: LanguageModel, tmp_path: Path) -> None:
    coder, reference = sae(tmp_path, CENTRED)
    tokens = ids(ours)
    wanted = cached(theirs(ours, **CENTRED), tokens, RESID).flatten(0, 1)
    stats, expected = ReconstructionStats(), ReconstructionStats()
    stats.add(ours.read(tokens, [RESID])[RESID].flatten(0, 1), coder)
    with torch.no_grad():
        expected.add_reconstruction(wanted, reference(wanted))
    for name, value in expected.metrics().items():
        assert stats.metrics()[name] == pytest.approx(value, rel=1e-4)


def test_its_reconstruction_and_directions_do_to_the_text_what_they_do_in_its_own_model(
    ours: LanguageModel, tmp_path: Path
) -> None:
    coder, reference = sae(tmp_path, CENTRED)
    model, tokens = theirs(ours, **CENTRED), ids(ours)

    def of_ours(edit: Any) -> torch.Tensor:
        with torch.inference_mode(), ours.edited({RESID: edit}):
            return ours.hf(input_ids=tokens).logits.log_softmax(-1)

    def of_theirs(edit: Any) -> torch.Tensor:
        with torch.inference_mode():
            hooks = [(RESID, lambda acts, hook: edit(acts))]
            return model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)

    shape = (*tokens.shape, D_MODEL)
    close(of_ours(lambda x: coder.reconstruct(x.flatten(0, 1)).view(shape)), of_theirs(reference), 1e-4)
    row = 7 * coder.unit_direction(11)
    close(of_ours(lambda x: x + row), of_theirs(lambda x: x + row), 1e-4)


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_centred_reconstruction_is_the_sum_of_its_parts(ours: LanguageModel, tmp_path: Path, normalise: str) -> None:
    coder, _ = sae(tmp_path, CENTRED, normalize_activations=normalise)
    acts = ours.read(ids(ours), [RESID])[RESID].flatten(0, 1)
    with torch.no_grad():
        active, writes, without = coder.parts(acts)
        summed = without.clone().index_add_(0, active.rows, writes)
        close(summed, coder.reconstruct(acts))
        latent, row = int(active.latents[0]), acts[int(active.rows[0])][None]
        close(active.values[0] * coder.unit_of(row, latent)[0], writes[0])


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_logit_is_taken_apart_as_in_the_model_that_a_centred_sae_was_trained_on(
    ours: LanguageModel, tmp_path: Path, normalise: str
) -> None:
    """Each feature's part, the bias and the error are those of transformer-lens' centred stream and sae-lens' SAE."""
    coder, reference = sae(tmp_path, CENTRED, normalize_activations=normalise)
    model, text, p = theirs(ours, **CENTRED), ids(ours)[0].tolist(), 9
    found = attribution.attribute(ours, coder, text, Target(position=p, token=7, against=11), 1000)
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([text]))
        y, r = cache[RESID][0, p], cache[f"blocks.{N_LAYERS - 1}.hook_resid_post"][0, p]
        scale = (r.var(unbiased=False) + 1e-5).sqrt()
        u = (model.W_U[:, 7] - model.W_U[:, 11]) * model.ln_final.w / scale
        u = u - u.mean()
        acts, x_hat = reference.encode(y[None]), reference(y[None])[0]
        size = 1.0  # what the normalisation of the input divided by
        if normalise == "layer_norm":
            size = float(y.std())
        elif normalise == "constant_norm_rescale":
            size = float(y.norm()) / D_MODEL**0.5
        parts = size * acts[0] * (reference.W_dec @ u)
        bias = float(size * reference.b_dec @ u)
    wanted = float(logits[0, p, 7] - logits[0, p, 11])
    tolerance = 1e-3 * max(1.0, abs(wanted), float(parts.abs().max()))
    assert found.logit == pytest.approx(wanted, abs=tolerance)
    for feature in found.features:
        assert feature.value == pytest.approx(float(parts[feature.latent]), abs=tolerance)
    assert {f.latent for f in found.features} == set(acts[0].nonzero()[:, 0].tolist())
    assert found.bias == pytest.approx(bias, abs=tolerance)
    assert found.error == pytest.approx(float((y - x_hat) @ u), abs=tolerance)


@pytest.mark.parametrize("normalise", ["none", "constant_norm_rescale"])
def test_faithfulness_and_error_shares_are_those_of_the_model_it_was_trained_on(
    ours: LanguageModel, tmp_path: Path, normalise: str
) -> None:
    coder, reference = sae(tmp_path, CENTRED, normalize_activations=normalise)
    model, text = theirs(ours, **CENTRED), ids(ours)[0].tolist()
    found = attribution.faithful(ours, coder, text)
    [[acts]] = encode(ours, [Text(text, [(coder, SaeQuery(sae=SaeRef(id="x", path="x"), totals=True))])])
    tokens = torch.tensor([text])

    def loss(edit: Any) -> float:
        hooks = [(RESID, lambda acts, hook: torch.cat([acts[:, :1], edit(acts)[:, 1:]], dim=1))]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))

    with torch.no_grad():
        x = model.run_with_cache(tokens)[1][RESID][0]
        x_hat = reference(x)
        expected = ReconstructionStats()
        expected.add_reconstruction(x[1:], x_hat[1:])
        assert found.explained_variance == pytest.approx(expected.metrics()["explained_variance"], rel=1e-4)
        assert found.cosine == pytest.approx(expected.metrics()["cosine_similarity"], rel=1e-4)
        assert found.loss_clean == pytest.approx(loss(lambda x: x), rel=1e-4)
        assert found.loss_spliced == pytest.approx(loss(reference), rel=1e-4)
        assert found.loss_ablated == pytest.approx(loss(torch.zeros_like), rel=1e-4)
    shares = (x - x_hat).square().sum(-1) / x.square().sum(-1)
    assert acts.error == pytest.approx(shares.tolist(), rel=1e-4)


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(("operation", "coefficient"), STEERED)
def test_steering_along_a_centred_sae_does_what_it_does_in_its_own_model(
    ours: LanguageModel, tmp_path: Path, operation: Operation, coefficient: float, normalise: str
) -> None:
    """Decoder rows and residuals have means over d_model that are not 0, which projections must not count here."""
    coder, reference = sae(tmp_path, CENTRED, normalize_activations=normalise)
    model, tokens = theirs(ours, **CENTRED), ids(ours)
    with torch.no_grad():
        latent = int(reference.encode(cached(model, tokens, RESID)).sum((0, 1)).argmax())
    ref = SaeRef(id="gpt2/1-sae", path="sae")
    asked = SteerDirection(sae=ref, latent=latent, operation=operation, coefficient=coefficient)
    what = intervention(asked, {"sae": coder}, ours)
    rows = [Applied(row, what, None) for row in range(len(tokens))]
    with torch.inference_mode(), ours.edited(edits(rows, len(tokens))):
        found = ours.hf(input_ids=tokens).logits.log_softmax(-1)

    def theirs_steered(h: torch.Tensor, hook: Any) -> torch.Tensor:
        v = reference.W_dec[latent] / reference.W_dec[latent].norm()
        along = (h @ v)[..., None]
        if operation is Operation.ORTHOGONAL:
            return h + (coefficient - 1) * along * v
        if operation is Operation.CAP:
            return h - (along - coefficient).clamp_min(0) * v
        acts = reference.encode(h)
        changed = acts.clone()
        changed[..., latent] = {Operation.CLAMP: coefficient, Operation.SCALE: coefficient * acts[..., latent]}[
            operation
        ]
        before = reference.decode(acts)  # undoes the normalisation of the last encode
        reference.encode(h)
        return h + reference.decode(changed) - before

    with torch.inference_mode():
        wanted = model.run_with_hooks(tokens, fwd_hooks=[(RESID, theirs_steered)]).log_softmax(-1)
        plain = model(tokens).log_softmax(-1)
    assert float((wanted - plain).abs().max()) > 0.1
    close(found, wanted, 1e-4)


@pytest.mark.parametrize("kwarg", ["fold_ln", "fold_value_biases", "center_unembed"])
def test_other_kwargs_change_the_hooks_they_are_refused_at_and_no_others(ours: LanguageModel, kwarg: str) -> None:
    tokens, model = ids(ours), theirs(ours, **{kwarg: True})
    for name in names(ours):
        config = {"metadata": {"hook_name": name, model_kwargs.KEY: {kwarg: True}}}
        same = torch.allclose(ours.read(tokens, [name])[name], cached(model, tokens, name), rtol=1e-4, atol=1e-4)
        try:
            model_kwargs.refuse_unknown(config, ours.card.architecture)
            refused = False
        except BadFile:
            refused = True
        assert refused != same, name


@pytest.mark.parametrize(
    ("kwargs", "architecture", "sentence"),
    [
        (CENTRED, "LlamaForCausalLM", "needs a model of LayerNorms; LlamaForCausalLM is not known as one"),
        ({"checkpoint_value": 512}, "GPT2LMHeadModel", "says checkpoint_value = 512; .* delete it from cfg.json"),
        (["fold_ln"], "GPT2LMHeadModel", "it must be an object"),
    ],
)
def test_what_cannot_be_made_up_for_is_refused(kwargs: Any, architecture: str, sentence: str) -> None:
    with pytest.raises(BadFile, match=sentence):
        model_kwargs.refuse_unknown({"metadata": {"hook_name": RESID, model_kwargs.KEY: kwargs}}, architecture)


@pytest.mark.parametrize(
    "kwargs", [{}, None, {"center_writing_weights": False}, {"dtype": "float32", "fold_ln": False, "device": "cuda"}]
)
def test_kwargs_that_change_nothing_are_accepted(kwargs: Any) -> None:
    model_kwargs.refuse_unknown({"metadata": {"hook_name": RESID, model_kwargs.KEY: kwargs}}, "LlamaForCausalLM")


def test_a_releases_kwargs_are_written_into_the_stored_config(ours: LanguageModel, tmp_path: Path) -> None:
    """Also into one from before SAELens 6, as gpt2-small-res-jb has."""
    settings = Settings(data_dir=tmp_path / "data")
    sae(tmp_path / "sae", {})
    old = {"hook_point": RESID, "d_in": D_MODEL, "d_sae": D_SAE, "normalize_activations": "none"}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(old))
    hints = formats.Hints(overrides={model_kwargs.KEY: CENTRED})
    with formats.in_saelens_format(tmp_path / "sae", settings, hints) as found:
        facts = weights.check_sae(found.directory, D_MODEL, settings)
        weights.check_fits(facts, ours.card)
        stored = weights.store_sae(settings, found.directory, facts)
    assert found.format == formats.SAELENS
    assert not (stored / "sae_weights.safetensors").is_symlink()
    assert SAE.load_from_disk(str(stored)).cfg.metadata.model_from_pretrained_kwargs == CENTRED
    shifted = torch.randn(5, D_MODEL) + 3
    close(load_sae(stored).encode(shifted), load_sae(stored).encode(shifted - 2))
