"""What the routes of the worker accept: texts within the limits, features that exist. Refusals name both numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from sqlalchemy.orm import Session

from app import catalog
from app.catalog import SourceCard
from app.errors import BadInput, NotFound
from app.gpu import Worker
from app.protocol import ModelRef, TokenizeRequest
from app.settings import Settings
from app.tokens import Vocabulary

ModelId = Annotated[str, Field(max_length=200)]
SourceId = Annotated[str, Field(max_length=200)]


def _as_text(index: object) -> object:
    return str(index) if isinstance(index, int) and not isinstance(index, bool) else index


Index = Annotated[str, BeforeValidator(_as_text), Field(max_length=40)]
"""A feature's index; clients send it as a string or as a number."""


class FeatureKey(BaseModel):
    """A feature's address. `layer` and `source` are two names of the same thing."""

    modelId: ModelId
    source: SourceId = Field(validation_alias=AliasChoices("source", "layer"))
    index: Index


def texts_of(settings: Settings, asked: str | list[str]) -> list[str]:
    """Return one or many texts as a list. Raises BadInput for none, too many, too long ones, or one that is empty."""
    texts = [asked] if isinstance(asked, str) else asked
    if not texts:
        raise BadInput("There is no text; send one text or a list of them.")
    if len(texts) > settings.max_texts:
        raise BadInput(f"{len(texts)} texts are too many; up to {settings.max_texts} are read in one request.")
    for text in texts:
        check_text(settings, text)
    return texts


def check_text(settings: Settings, text: str) -> None:
    if not text:
        raise BadInput("The text is empty; send at least one character.")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadInput(f"The text holds a lone surrogate at character {error.start}; it is not valid text.") from None
    if size > settings.max_text_bytes:
        raise BadInput(f"The text is {size} bytes; up to {settings.max_text_bytes} are read. Shorten it.")


def find_feature(session: Session, key: FeatureKey) -> tuple[SourceCard, int]:
    """Return a feature's source and latent. Raises NotFound."""
    source = catalog.source_card(session, key.modelId, key.source)
    return source, latent_of(source, key.index)


def latent_of(source: SourceCard, index: str) -> int:
    """Return the latent that an index names. Raises NotFound where the source has none."""
    latent = catalog.parse_index(index)
    if latent >= source.d_sae:
        raise NotFound(
            f"{source.model_id}/{source.name} has features 0 to {source.d_sae - 1}; there is no feature {latent}."
        )
    return latent


async def find_token(worker: Worker, model: ModelRef, words: Vocabulary, said: str) -> int:
    """Return the token that a text is. Raises BadInput for a text of several tokens, or of none."""
    [ids] = (await worker.tokenize(TokenizeRequest(model=model, texts=[said], prepend_bos=False))).ids
    if len(ids) != 1:
        parts = " + ".join(repr(part) for part in words.strings(ids))
        raise BadInput(
            f"{said[:60]!r} is {len(ids)} tokens ({parts[:200]}), and one is needed. A space before a word counts."
        )
    return ids[0]
