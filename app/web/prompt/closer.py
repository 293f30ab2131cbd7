"""The closer looks of the prompt lab, a question each to the worker: predictions, attribution, faithfulness."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from app import catalog, present
from app.api.inputs import find_token
from app.catalog import FeatureRow, SourceCard
from app.errors import BadInput
from app.gpu import Worker
from app.protocol import (
    AblateRequest,
    AttributeReply,
    AttributeRequest,
    FaithfulRequest,
    GradientRequest,
    PredictRequest,
    Target,
)
from app.settings import Settings
from app.tokens import Vocabulary
from app.web.prompt import reading
from app.web.prompt.reading import Focus, Reading

TOP_PREDICTIONS = 5
TOP_TERMS = 25
N_SLOPES = 1000
_ID = re.compile(r"#([0-9]{1,9})", re.ASCII)


@dataclass(frozen=True)
class Closer:
    """One text, one source, and the way to the worker."""

    settings: Settings
    worker: Worker
    model_id: str
    source: SourceCard
    text: str
    focus: Focus
    words: Vocabulary

    async def look(self, shown: Reading, sources: Sequence[SourceCard]) -> Reading:
        """Return the reading with what its view adds."""
        lab = self.focus.lab
        if shown.token is not None and lab.view == "tokens":
            shown = await self._strengths(shown)
        match lab.view:
            case "grid":
                pinned = [self.focus.row(index) for name, index in lab.pinned() if name == self.source.name]
                listed = [r.feature for r in shown.ranked if r.feature not in pinned]
                features = [*pinned, *listed][: reading.N_GRID]
                return replace(shown, figure=reading.grid(self.focus, features)) if features else shown
            case "layers":
                figure = reading.layers(sources, self.focus.text, self.focus.strings, self.focus.hidden, lab)
                return replace(shown, figure=figure)
            case "next":
                return await self._next(shown)
            case "faithful":
                asked = FaithfulRequest(**self._about(), sae=catalog.sae_ref(self.settings, self.source))
                return replace(shown, faithful=await self.worker.faithful(asked))
            case _:
                return shown

    async def loss_effects(self) -> dict[int, float]:
        """To first order, how much the loss of the text is higher with each feature than without it."""
        found = await self.worker.gradient(self._slopes(None, N_SLOPES))
        return dict(found.latents)

    def _slopes(self, target: Target | None, top_k: int) -> GradientRequest:
        sae, skip = catalog.sae_ref(self.settings, self.source), int(self.focus.hidden[0])
        return GradientRequest(**self._about(), sae=sae, target=target, top_k=top_k, skip=skip)

    def _about(self) -> dict[str, Any]:
        model = catalog.model_ref(self.settings, self.model_id)
        return {"model": model, "text": self.text, "prepend_bos": self.source.prepend_bos}

    async def _strengths(self, shown: Reading) -> Reading:
        """The features of the chosen token, with their direct parts in the logit of the likeliest next token."""
        assert shown.token is not None
        position = shown.token.position
        try:
            found: AttributeReply | None = await self._attribute(Target(position=position, token=None), 1000)
        except BadInput:  # an SAE beside the residual stream has no direct part
            found = None
        effects = {f.latent: f.value for f in found.features} if found else {}
        active = self.focus.active(position)[: reading.N_STRENGTHS]
        full = max((value for _, value in active), default=0.0)
        strengths = tuple(
            reading.Strength(f, value, present.level(value, full), effects.get(f.index)) for f, value in active
        )
        return replace(shown, strengths=strengths, likeliest=self.words.string(found.token) if found else "")

    async def _next(self, shown: Reading) -> Reading:
        asked = PredictRequest(**self._about(), top_k=TOP_PREDICTIONS)
        predictions = (await self.worker.predict(asked)).positions
        shown = replace(
            shown,
            expected=reading.expected(self.focus, predictions, self.words),
            n_expected=len(predictions),
        )
        if shown.token is None:
            return shown
        lab, position = self.focus.lab, shown.token.position
        token, against = await self._token(lab.token), await self._token(lab.against)
        token = predictions[position].ids[0] if token is None else token
        target = Target(position=position, token=token, against=against)
        name = f"“{self.words.string(token)}”" + ("" if against is None else f" less “{self.words.string(against)}”")
        if lab.how == "gradient":
            slopes = await self.worker.gradient(self._slopes(target, 2 * TOP_TERMS))
            shown = replace(shown, attribution=reading.slopes(self.focus, slopes, name, position))
        else:
            found = await self._attribute(target, TOP_TERMS)
            later = later_words(self.source)
            shown = replace(shown, attribution=reading.attribution(self.focus, found, name, position, later))
        return await self._ablated(shown, target)

    async def _attribute(self, target: Target, top_k: int) -> AttributeReply:
        sae = catalog.sae_ref(self.settings, self.source)
        return await self.worker.attribute(AttributeRequest(**self._about(), sae=sae, target=target, top_k=top_k))

    async def _ablated(self, shown: Reading, target: Target) -> Reading:
        latent = self.focus.lab.ablated
        if latent is None or latent >= self.source.d_sae:
            return shown
        sae = catalog.sae_ref(self.settings, self.source)
        found = await self.worker.ablate(AblateRequest(**self._about(), sae=sae, latent=latent, target=target))
        feature: FeatureRow = self.focus.row(latent)
        return replace(shown, ablation=found, ablated=feature)

    async def _token(self, said: str) -> int | None:
        """Return the token of `#id` or of a text. Raises BadInput for a text of several tokens."""
        if not said:
            return None
        if found := _ID.fullmatch(said):
            return int(found[1])
        return await find_token(self.worker, catalog.model_ref(self.settings, self.model_id), self.words, said)


def later_words(source: SourceCard) -> str:
    """Say what else is written to the stream, for an SAE of this hook."""
    if ".hook_resid_" in source.hook_name:
        return f"later layers: what is written after {source.hook_name}"
    return f"everything written elsewhere than at {source.hook_name}"
