"""Lists of features: the overview, a list with a text tried on all its features, and quick lists by address."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

from fastapi import APIRouter, Form, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from app import catalog, comments, lists, present, search, trash
from app.api.inputs import check_text
from app.errors import AtlasError, BadInput
from app.gpu import Worker
from app.lists import Key, Listed, Summary, Visibility
from app.people import Actor
from app.present import ShadedToken, Window
from app.protocol import EncodeRequest, SaeQuery
from app.settings import Settings
from app.web.access import ANYONE, EDITOR, VIEWER, SignInNeeded, Who, actor_of
from app.web.comments import Talk, talk
from app.web.pages import Config, Db, Gpu, query, render
from app.web.problems import Problem, of
from app.web.search import top_window

router = APIRouter()

MAX_ADDRESS = 60_000
DEFAULT_STRENGTH = 10
MAX_STEERED = 8
"""Features that the link to the steering page takes along, of each model."""
_WORDS = {
    Visibility.PRIVATE: "only you",
    Visibility.TEAM: "everybody here",
    Visibility.LINK: "whoever has the address",
}
Text = Annotated[str, Form(max_length=lists.MAX_TEXT + 1)]


@dataclass(frozen=True)
class ListsPage:
    lists: tuple[Summary, ...]
    adding: Key | None = None
    """A feature that is to be put into one of them."""
    problem: Problem | None = None


@dataclass(frozen=True)
class Tried:
    """What a feature does on the text."""

    tokens: tuple[ShadedToken, ...]
    max: float


@dataclass(frozen=True)
class Line:
    """A feature of the list as shown."""

    listed: Listed
    example: Window | None
    tried: Tried | None = None

    @property
    def field(self) -> str:
        """Its address, as forms send it."""
        return self.listed.key.path[1:]


@dataclass(frozen=True)
class ListPage:
    id: str
    """Empty for a quick list, which is only in the address."""
    name: str
    description: str
    owner: str
    visibility: str
    lines: tuple[Line, ...]
    text: str
    steer: tuple[tuple[str, str], ...]
    """Where all of them are steered with, a link for each model."""
    may_change: bool
    editing: bool = False
    quick: str = ""
    """The features of a quick list as they stand in its address."""
    talk: Talk | None = None
    """What people said of it; a quick list has no place for that."""
    loading: tuple[Any, ...] = ()
    problem: Problem | None = None

    @property
    def path(self) -> str:
        return f"/lists/{self.id}" if self.id else "/quick-list/"

    @property
    def here(self) -> str:
        """Its address with the text, which asks again while a model loads."""
        quick = {} if self.id else {"name": self.name, "features": self.quick}
        return self.path + query({**quick, "text": self.text})

    @property
    def choices(self) -> tuple[tuple[str, str], ...]:
        return tuple((value, words) for value, words in _WORDS.items())

    @property
    def shared_with(self) -> str:
        return _WORDS[Visibility(self.visibility)]


@router.get("/lists", dependencies=[VIEWER])
def lists_page(request: Request, who: Who, session: Db) -> Response:
    return render(request, "lists.html", ListsPage(tuple(lists.seen_by(session, who))))


@router.get("/lists/add", dependencies=[EDITOR])
def choose(request: Request, who: Who, session: Db, feature: Annotated[str, Query(max_length=500)] = "") -> Response:
    """Ask which list a feature goes into."""
    own = [s for s in lists.seen_by(session, who) if lists.may_change(who, lists.get(session, who, s.id))]
    return render(request, "lists.html", ListsPage(tuple(own), key_of(feature)))


@router.post("/lists", dependencies=[EDITOR])
def make(request: Request, who: Who, session: Db, name: Text = "", feature: Text = "") -> Response:
    features = [key_of(feature)] if feature else []
    made = lists.new(session, who, name, features=features)
    session.commit()
    return RedirectResponse(f"/lists/{made.id}", 303)


@router.get("/lists/{list_id}", dependencies=[ANYONE])
async def list_page(
    request: Request,
    list_id: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    text: Annotated[str | None, Query(max_length=lists.MAX_TEXT)] = None,
    edit: bool = False,
) -> Response:
    """Show a list. One shared by link is shown to strangers too, but texts are tried for people alone."""
    who = actor_of(request)
    page = await run_in_threadpool(_stored, session, settings, who, list_id, text, edit)
    if who is not None and page.text.strip():
        page = await _with_text(session, settings, worker, page)
    return render(request, "list.html", page)


@router.post("/lists/{list_id}/edit", dependencies=[EDITOR])
def edit(
    list_id: str,
    who: Who,
    session: Db,
    name: Text = "",
    description: Text = "",
    test_text: Text = "",
    visibility: Text = Visibility.TEAM,
) -> Response:
    found = lists.to_change(session, who, list_id)
    if visibility not in set(Visibility):
        raise BadInput(f"A list is {', '.join(Visibility)}; not {visibility[:40]!r}.")
    lists.edit(found, name, description, test_text.replace("\r\n", "\n"), Visibility(visibility))
    session.commit()
    return RedirectResponse(f"/lists/{found.id}", 303)


@router.post("/lists/{list_id}/delete", dependencies=[EDITOR])
def delete(list_id: str, who: Who, session: Db) -> Response:
    trash.put(session, who, lists.to_change(session, who, list_id))
    session.commit()
    return RedirectResponse("/lists", 303)


@router.post("/lists/{list_id}/features", dependencies=[EDITOR])
def add(list_id: str, who: Who, session: Db, feature: Text = "") -> Response:
    """Put in one or more features, by address, one a line."""
    found = lists.to_change(session, who, list_id)
    lists.add(session, found, [key_of(line) for line in feature.split() if line])
    session.commit()
    return RedirectResponse(f"/lists/{found.id}", 303)


@router.post("/lists/{list_id}/change", dependencies=[EDITOR])
def change(
    list_id: str, who: Who, session: Db, feature: Text = "", act: Text = "", note: Text = "", place: Text = ""
) -> Response:
    """Annotate, move or remove one feature."""
    found = lists.to_change(session, who, list_id)
    key = key_of(feature)
    held = lists.item(session, found, key.model_id, key.source, key.index)
    if act == "remove":
        lists.drop(session, found, held)
    elif act in ("up", "down"):
        lists.move(session, found, held, lists.items(session, found).index(held) + (1 if act == "down" else -1))
    else:
        lists.annotate(found, held, note)
    session.commit()
    return RedirectResponse(f"/lists/{found.id}?edit=1#f-{key.source}-{key.index}", 303)


@router.get("/quick-list", dependencies=[VIEWER])
@router.get("/quick-list/", dependencies=[VIEWER])
async def quick(
    request: Request,
    session: Db,
    settings: Config,
    worker: Gpu,
    name: Annotated[str, Query(max_length=lists.MAX_NAME)] = "",
    features: Annotated[str, Query(max_length=MAX_ADDRESS)] = "[]",
    text: Annotated[str, Query(max_length=lists.MAX_TEXT)] = "",
) -> Response:
    """A list that stands in its address alone, as SAELens' get_neuronpedia_quick_list makes them."""
    page = await run_in_threadpool(_quick, session, settings, name, features, text)
    if text.strip():
        page = await _with_text(session, settings, worker, page)
    return render(request, "list.html", page)


@router.post("/quick-list/", dependencies=[EDITOR])
def keep(
    who: Who, session: Db, name: Text = "", features: Annotated[str, Form(max_length=MAX_ADDRESS)] = "[]"
) -> Response:
    """Make a list of a quick list, or a copy of a list."""
    made = lists.new(session, who, name, features=_keys(features))
    session.commit()
    return RedirectResponse(f"/lists/{made.id}", 303)


def _stored(
    session: Session, settings: Settings, who: Actor | None, list_id: str, text: str | None, editing: bool
) -> ListPage:
    try:
        found = lists.get(session, who, list_id)
    except AtlasError:
        if who is None:
            raise SignInNeeded("Sign in to see this list.") from None
        raise
    keys = lists.keys(lists.items(session, found))
    listed = lists.described(session, keys)
    return ListPage(
        id=found.id,
        name=found.name,
        description=found.description,
        owner=found.owner,
        visibility=found.visibility,
        lines=_lines(session, settings, listed),
        text=found.test_text if text is None else text,
        steer=_steering(listed),
        may_change=lists.may_change(who, found),
        editing=editing and lists.may_change(who, found),
        quick=address_of(keys),
        talk=talk(session, who, comments.of_list(found.id)),
    )


def _quick(session: Session, settings: Settings, name: str, features: str, text: str) -> ListPage:
    keys = _keys(features)
    listed = lists.described(session, keys)
    return ListPage(
        id="",
        name=name.strip() or "Quick list",
        description="",
        owner="",
        visibility=Visibility.TEAM,
        lines=_lines(session, settings, listed),
        text=text,
        steer=_steering(listed),
        may_change=False,
        quick=address_of(keys),
    )


def address_of(keys: Sequence[Key]) -> str:
    """Return features as they stand in a quick list's address."""
    return json.dumps([{"modelId": key.model_id, "layer": key.source, "index": str(key.index)} for key in keys])


def _keys(features: str) -> list[Key]:
    """Read the features of a quick list's address. Raises BadInput with what is wrong."""
    try:
        given = json.loads(features)
    except (ValueError, RecursionError):
        raise BadInput(
            'features is no JSON; it is a list such as [{"modelId": "m", "layer": "8-res", "index": "7"}].'
        ) from None
    if not isinstance(given, list):
        raise BadInput("features is a list of objects with modelId, layer and index.")
    rows = cast(list[Any], given)
    if len(rows) > lists.MAX_FEATURES:
        raise BadInput(f"The list names {len(rows):,} features; it may name {lists.MAX_FEATURES}.")
    return [_of_json(row) for row in rows]


def _of_json(row: Any) -> Key:
    if not isinstance(row, dict):
        raise BadInput("Each feature is an object with modelId, layer and index.")
    fields = cast(dict[str, Any], row)
    model, source, index = fields.get("modelId"), fields.get("layer", fields.get("source")), fields.get("index")
    if not isinstance(model, str) or not isinstance(source, str) or not isinstance(index, str | int):
        raise BadInput("A feature lacks modelId, layer or index.")
    note = fields.get("description")
    return Key(model[:200], source[:200], catalog.parse_index(str(index)), note if isinstance(note, str) else "")


def key_of(address: str) -> Key:
    """Read `model/source/index`, also within a whole address. Raises BadInput."""
    parts = address.strip().partition("?")[0].rstrip("/").split("/")
    if len(parts) < 3 or not all(parts[-3:]):
        raise BadInput(f"{address[:80]!r} is no feature; write model/source/index, or paste its address.")
    return Key(parts[-3][:200], parts[-2][:200], catalog.parse_index(parts[-1]))


def _lines(session: Session, settings: Settings, listed: Sequence[Listed]) -> tuple[Line, ...]:
    here = [(each.card.id, each.key.index) for each in listed if each.card is not None]
    examples = search.examples_of(session, here)
    specials = {e.card.id: frozenset(e.card.special_token_ids) for e in catalog.entries(session)} if here else {}
    lines: list[Line] = []
    for each in listed:
        found = examples.get((each.card.id, each.key.index)) if each.card else None
        special = specials.get(each.key.model_id, frozenset[int]())
        lines.append(Line(each, top_window(settings, found, each.key.model_id, special) if found else None))
    return tuple(lines)


def _steering(listed: Sequence[Listed]) -> tuple[tuple[str, str], ...]:
    """Return for each model the address that steers with its features; the first few of a long list."""
    by_model: dict[str, list[str]] = {}
    for each in listed:
        if each.card is not None and each.card.has_weights:
            by_model.setdefault(each.key.model_id, []).append(f"{each.key.source}:{each.key.index}:{DEFAULT_STRENGTH}")
    return tuple(
        (model, f"/{model}/steer" + query({"feature": some[:MAX_STEERED]})) for model, some in by_model.items()
    )


async def _with_text(session: Session, settings: Settings, worker: Worker, page: ListPage) -> ListPage:
    """Return the page with what each feature does on the text; a failure is said on the page."""
    try:
        check_text(settings, page.text)
        tried: dict[Key, Tried] = {}
        requests = await run_in_threadpool(_requests, session, settings, page)
        for request, groups in requests:
            loading = await worker.loading(request.model, [q.sae for q in request.queries])
            if loading:
                return replace(page, loading=tuple(loading))
            reply = (await worker.encode(request)).texts[0]
            words = catalog.vocabulary_of(settings, groups[0][0].key.model_id)
            special = await run_in_threadpool(_special, session, groups[0][0].key.model_id)
            for acts, group in zip(reply.saes, groups, strict=True):
                for values, listed in zip(acts.latents, group, strict=True):
                    highest = max(values, default=0.0)
                    full = max(listed.feature.max_act if listed.feature else 0.0, highest)
                    tried[listed.key] = Tried(present.shaded(reply.ids, values, words, special, full), highest)
    except AtlasError as error:
        return replace(page, problem=of(error))
    return replace(page, lines=tuple(replace(line, tried=tried.get(line.listed.key)) for line in page.lines))


def _special(session: Session, model_id: str) -> frozenset[int]:
    return frozenset(catalog.model_entry(session, model_id).card.special_token_ids)


def _requests(session: Session, settings: Settings, page: ListPage) -> list[tuple[EncodeRequest, list[list[Listed]]]]:
    """Return one request for each model (and way to begin a text), with the features each of its queries asks for."""
    saes: dict[tuple[str, bool], dict[int, list[Listed]]] = {}
    for line in page.lines:
        card = line.listed.card
        if card is not None and card.has_weights and catalog.has_model_weights(settings, card.model_id):
            saes.setdefault((card.model_id, card.prepend_bos), {}).setdefault(card.id, []).append(line.listed)
    found: list[tuple[EncodeRequest, list[list[Listed]]]] = []
    for (model_id, prepend_bos), groups in saes.items():
        queries: list[SaeQuery] = []
        for group in groups.values():
            card = group[0].card
            assert card is not None
            latents = [each.key.index for each in group]
            queries.append(SaeQuery(sae=catalog.sae_ref(settings, card), top_k=0, latents=latents))
        request = EncodeRequest(
            model=catalog.model_ref(settings, model_id), texts=[page.text], queries=queries, prepend_bos=prepend_bos
        )
        found.append((request, list(groups.values())))
    return found
