"""What SAEs are chosen by in addresses of the home and of models: a tag, an owner, one's own stars."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from app.cards import Chosen


async def _choice(
    tag: Annotated[str, Query(max_length=40)] = "",
    owner: Annotated[str, Query(max_length=200)] = "",
    starred: Annotated[bool, Query()] = False,
) -> Chosen:
    return Chosen(tag.strip().lower(), owner.strip(), starred)


Choice = Annotated[Chosen, Depends(_choice)]
