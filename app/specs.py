"""What a job is asked to do, validated: the YAML of `sae-atlas train` and the JSON kept with the job."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIN_HARVEST_TOKENS = 1_000


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HarvestSpec(Spec):
    """Compute the evidence of every feature of some SAEs of one model from one corpus, in one pass of the model."""

    model: str = Field(description="Model id in the catalog.")
    sources: tuple[str, ...] = Field(
        min_length=1,
        max_length=64,
        description="Source ids in that model, such as 12-demo; `source` names a single one.",
    )
    corpus: str = Field(description="Corpus in the catalog.")
    n_tokens: int = Field(
        1_000_000, ge=MIN_HARVEST_TOKENS, description="Tokens to read, from the corpus' start; first positions extra."
    )
    context_size: int = Field(128, ge=8, le=4096, description="Tokens the model sees at once.")
    n_top: int = Field(20, ge=1, le=100, description="Top activating examples kept for a feature, one per context.")
    n_per_interval: int = Field(
        5, ge=0, le=20, description="Examples sampled for each of the five activation intervals."
    )
    n_silent: int = Field(5, ge=0, le=20, description="Contexts without an activation, drawn at random.")
    n_hard: int = Field(5, ge=0, le=20, description="Hard negatives: silent contexts near the positives.")
    n_effects: int = Field(
        5, ge=0, le=100, description="Top examples whose causal effect is measured; 0 measures none."
    )
    effect_reach: int = Field(
        8, ge=0, le=4096, description="Tokens behind the peak over which a causal effect is followed, in its context."
    )
    keep_activations: bool = Field(
        False, description="Keep the sparse activations, 8 bytes each, so that a longer harvest reads only what is new."
    )
    draw_map: bool = Field(True, description="Queue a 2-D map of the decoder directions where there is none yet.")
    seed: int = Field(0, ge=0, description="Seed of the samples and of the map.")

    @model_validator(mode="before")
    @classmethod
    def _single(cls, given: Any) -> Any:
        if isinstance(given, dict) and "source" in given:
            rest = {key: value for key, value in cast(dict[str, Any], given).items() if key != "source"}
            return {**rest, "sources": (given["source"],)}
        return cast(Any, given)

    @model_validator(mode="after")
    def _distinct(self) -> HarvestSpec:
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("a source is named twice")
        return self


class CorpusSpec(Spec):
    """Store text as a corpus: a file or directory, or a dataset of the Hugging Face hub, streamed."""

    name: str = Field("", max_length=100, description="Its name in the catalog; the file's or dataset's otherwise.")
    about: str = Field("", max_length=2_000, description="Where it comes from.")
    licence: str = Field("", max_length=200, description="Licence of the text.")
    text_column: str = Field("text", min_length=1, max_length=200, description="Field or column that holds the text.")
    title_column: str = Field(
        "", max_length=200, description="Field of a title that examples show; `title` where there is one."
    )
    source_column: str = Field(
        "", max_length=200, description="Field that says where a document is from; `source` where there is one."
    )
    max_documents: int = Field(0, ge=0, lt=2**63, description="Stop after so many documents; 0 reads all.")
    max_chars: int = Field(0, ge=0, lt=2**63, description="Stop after so many characters; 0 reads all.")
    path: str = Field("", description="File or directory of text, JSONL or parquet on the trainer's machine.")
    uploaded_as: str = Field("", max_length=1_000, description="What an upload's files were called.")
    dataset: str = Field("", max_length=200, description="Dataset of the Hugging Face hub instead, as owner/name.")
    config: str = Field("", max_length=100, description="Configuration of that dataset.")
    split: str = Field("train", max_length=100, description="Split of that dataset.")


class ImportSpec(Spec):
    """Read evidence that a browser sent: a bundle, a Neuronpedia export, batches of sae_dashboard."""

    path: str = Field(description="Directory or file that holds it, on the trainer's machine.")
    root: str = Field(description="The upload it belongs to, deleted once it is read.")
    uploaded_as: str = Field("", max_length=200, description="What the upload was called.")
    url: str = Field(default="", max_length=2000, description="Web address of the bundle, fetched to the path first.")
    manifest_sha256: str = Field(default="", max_length=64, description="Of the bundle's manifest, as it was chosen.")
    model: str = Field("", max_length=200, description="Model id to import under, where the files' own will not do.")
    set_name: str = Field("", max_length=64, description="Set name to import under.")


class MapSpec(Spec):
    """Draw the decoder directions of an SAE on a plane, near ones close together, and name the clusters."""

    model: str = Field(description="Model id in the catalog.")
    source: str = Field(description="Source id in that model, such as 12-demo.")
    n_neighbors: int = Field(15, ge=2, le=200, description="Neighbours of a feature that UMAP keeps close.")
    min_dist: float = Field(0.05, ge=0, le=1, description="How close UMAP may pack features.")
    seed: int = Field(0, ge=0, description="The same seed draws the same map.")


class MatchSpec(Spec):
    """Find the nearest features of one SAE in another of the same model, by cosine of decoder rows, both ways."""

    model: str = Field(description="Model id in the catalog.")
    source: str = Field(description="Source id in that model, such as 12-demo.")
    other: str = Field(description="Another source id in that model with the same width.")
    n: int = Field(10, ge=1, le=100, description="Nearest features kept of each.")


class ValidateSpec(Spec):
    """Measure an SAE on some real text and say whether it fits its model and hook."""

    model: str = Field(description="Model id in the catalog.")
    source: str = Field(description="Source id in that model, such as 12-demo.")
    corpus: str = Field("", description="Corpus in the catalog; empty means the largest, or the demo's text.")
    n_tokens: int = Field(10_000, ge=500, description="Tokens to read; first positions extra.")
    context_size: int = Field(128, ge=8, le=4096, description="Tokens the model sees at once.")


class BulkSpec(Spec):
    """Encode many texts with one SAE, and find the features that tell two groups of them apart."""

    model: str = Field(description="Model id in the catalog.")
    source: str = Field(description="Source id in that model, such as 12-demo.")
    path: str = Field(description="File of texts on the trainer's machine: JSONL, CSV or parquet.")
    text_column: str = Field("text", min_length=1, description="Column that holds the texts.")
    label_column: str = Field("", description="Column that holds one of two groups; empty finds no features.")
    output: Literal["activations", "maxima"] = Field(
        "activations", description="Every non-zero activation, or each text's maximum of each feature."
    )
    n_features: int = Field(50, ge=1, le=1000, description="Features that best tell the groups apart.")
    held_out: float = Field(0.3, gt=0, lt=0.9, description="Share of each group kept for the held-out score.")
    seed: int = Field(0, ge=0, description="Seed of the split.")


class EvalSpec(Spec):
    """Measure an SAE on some text: reconstruction, sparsity, and how well the model predicts with it spliced in."""

    model: str = Field(max_length=200, description="Model id in the catalog.")
    source: str = Field(max_length=200, description="Source id in that model, such as 12-demo.")
    corpus: str = Field(
        "", max_length=100, description="Corpus in the catalog; empty means the one it was trained on, or the largest."
    )
    n_tokens: int = Field(
        50_000, ge=1_000, le=100_000_000, description="Tokens for reconstruction and sparsity; first positions extra."
    )
    n_loss_tokens: int = Field(
        20_000,
        ge=500,
        le=100_000_000,
        description="Of these, tokens for ce_loss_score and kl_div_score, which cost more.",
    )
    context_size: int = Field(128, ge=8, le=4096, description="Tokens the model sees at once.")
    max_norm_ratio: float = Field(
        6.0,
        gt=1,
        description="Tokens whose norm exceeds this multiple of the median are in no metric: attention sinks.",
    )
