"""Routes of the prompt lab: read texts, keep a prompt under an address, and the old addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.responses import RedirectResponse, Response

from app import catalog, prompts
from app.api.inputs import texts_of
from app.catalog import ModelEntry, SourceCard
from app.errors import AtlasError, BadInput, NotFound, TooLarge
from app.gpu import Worker
from app.protocol import ChatMessage, ChatRequest, EncodeReply, EncodeRequest, Loading, SaeQuery
from app.settings import Settings
from app.web import visits
from app.web.access import VIEWER
from app.web.guard import CHART_POLICY
from app.web.pages import Config, Db, Gpu, partial, read, render
from app.web.problems import Problem, of
from app.web.prompt import closer, reading
from app.web.prompt.reading import Focus, Reading
from app.web.prompt.state import MAX_SOURCES, ROLES, Lab, lab_of

router = APIRouter()

MAX_ADDRESS = 3000
MAX_FORM_FIELDS = 2000
MAX_ACTIVE = 256
"""Features of a token that are looked at, where the SAE has no k of its own."""
EXAMPLE = "The harbour was quiet that morning. She counted 12 boats, opened her notebook and wrote: import numpy as np"
_HEADERS = {"content-security-policy": CHART_POLICY}


@dataclass(frozen=True)
class PromptPage:
    """The page: what was asked, and the reading, or what is loading, or what went wrong."""

    entry: ModelEntry
    lab: Lab
    sources: tuple[SourceCard, ...]
    """The chosen ones, lowest layer first."""
    focus: SourceCard | None
    texts: tuple[str, ...] = ()
    reading: Reading | None = None
    problem: Problem | None = None
    loading: tuple[Loading, ...] = ()
    saved: str = ""
    """Address of the kept prompt that this shows."""
    changed: tuple[str, ...] = ()
    """Sources whose weights are others than when the prompt was kept."""
    example: str = EXAMPLE
    roles: tuple[str, ...] = ROLES

    @property
    def path(self) -> str:
        return f"{self.entry.path}/prompt"

    @property
    def address(self) -> str:
        return self.lab.address(self.path)

    @property
    def sets(self) -> tuple[str, ...]:
        """Sets with more than one layer."""
        names = [source.set_name for source in self.entry.sources]
        return tuple(dict.fromkeys(name for name in names if names.count(name) > 1))

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The chat so far, and an empty message to fill."""
        turns = tuple(self.lab.messages)
        following = "user" if not turns or turns[-1][0] != "user" else "assistant"
        return (*turns, (following, ""))

    def turned(self, **changes: Any) -> str:
        """The address with some changes."""
        return replace(self.lab, **changes).address(self.path)


@router.get("/{model}/prompt", dependencies=[VIEWER])
async def prompt_from_address(request: Request, model: str, session: Db, settings: Config, worker: Gpu) -> Response:
    return await _answer(request, model, _values(request.query_params), session, settings, worker)


@router.post("/{model}/prompt", dependencies=[VIEWER])
async def prompt(request: Request, model: str, session: Db, settings: Config, worker: Gpu) -> Response:
    values = await _form(request, settings)
    if not partial(request):
        # Without scripts too, what is shown has an address, as long as addresses may be long.
        address = lab_of(values).address(f"/{model}/prompt")
        if len(address) <= MAX_ADDRESS:
            return RedirectResponse(address, 303)
    return await _answer(request, model, values, session, settings, worker)


@router.post("/{model}/prompt/save", dependencies=[VIEWER])
async def save(request: Request, model: str, session: Db, settings: Config) -> Response:
    """Keep the prompt as it is, and lead to its address."""
    lab = lab_of(await _form(request, settings))

    def keep() -> str:
        entry = catalog.model_entry(session, model)
        chosen = choose(entry, lab)
        if lab.empty:
            raise BadInput("There is no text to keep; paste one first.")
        run = prompts.save(session, entry.card.id, lab.parameters(), {s.name: s.sae_hash for s in chosen})
        session.commit()
        return prompts.path(run)

    return RedirectResponse(await run_in_threadpool(keep), 303)


@router.get("/{model}/prompt/{run_id}", dependencies=[VIEWER])
async def saved(request: Request, model: str, run_id: str, session: Db, settings: Config, worker: Gpu) -> Response:
    entry = await read(session, catalog.model_entry, session, model)
    run = await read(session, prompts.get, session, entry.card.id, run_id)
    hashes, values, path = dict(run.hashes), dict(run.request), prompts.path(run)
    return await _answer(request, model, values, session, settings, worker, path, hashes)


@router.get("/{model}/{source}/prompt", dependencies=[VIEWER])
def old_address(request: Request, model: str, source: str, session: Db) -> Response:
    """The address of earlier versions, one source each; its parameters mean the same."""
    card = catalog.source_card(session, model, source)
    values = _values(request.query_params) | {"sae": [card.name]}
    return RedirectResponse(lab_of(values).address(f"/{card.model_id}/prompt"), 307)


def choose(entry: ModelEntry, lab: Lab) -> tuple[SourceCard, ...]:
    """Return the chosen sources of a model, lowest layer first; where none is named the default or one with evidence.

    Raises NotFound for unknown names, BadInput where sources cannot be read together.
    """
    if not entry.sources:
        return ()
    if not lab.sae:
        known = [s for s in entry.sources if s.harvest_id is not None]
        return (next((s for s in entry.sources if s.is_default), (known or entry.sources)[0]),)
    wanted = set(lab.sae)
    chosen = tuple(s for s in entry.sources if s.name in wanted or f"*-{s.set_name}" in wanted)
    unknown = wanted - {s.name for s in chosen} - {f"*-{s.set_name}" for s in chosen}
    if unknown:
        known = ", ".join(s.name for s in entry.sources)
        raise NotFound(f"{entry.card.id} has no SAE {', '.join(sorted(unknown))[:200]}; it has {known[:500]}.")
    if len(chosen) > MAX_SOURCES:
        raise BadInput(f"{len(chosen)} SAEs are chosen; up to {MAX_SOURCES} are read together.")
    without = [s.name for s in chosen if not s.prepend_bos]
    if without and len(without) < len(chosen):
        raise BadInput(
            f"{', '.join(without)[:200]} read texts without the model's first token, the others with it; "
            "choose SAEs of one kind."
        )
    return chosen


def _values(found: QueryParams | FormData) -> dict[str, Sequence[str]]:
    names = dict.fromkeys(name for name, _ in found.multi_items())
    return {name: [v for v in found.getlist(name) if isinstance(v, str)] for name in names}


async def _form(request: Request, settings: Settings) -> Mapping[str, Sequence[str]]:
    """Read a form; a file of lines takes the place of the text."""
    form = await request.form(max_fields=MAX_FORM_FIELDS, max_files=1, max_part_size=2**25)
    values = _values(request.query_params) | _values(form)
    file = form.get("file")
    if isinstance(file, UploadFile) and file.filename:
        most = settings.max_text_bytes * settings.max_texts
        content = await file.read(most + 1)
        if len(content) > most:
            raise TooLarge(f"The file is more than {most:,} bytes, what a page reads; use a bulk job for more.")
        try:
            values["text"] = [content.decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise BadInput(f"The file is no UTF-8 text: byte {error.start} cannot be read.") from None
        values["kind"] = ["lines"]
    return values


async def _answer(
    request: Request,
    model: str,
    values: Mapping[str, Sequence[str]],
    session: Session,
    settings: Settings,
    worker: Worker,
    kept: str = "",
    hashes: Mapping[str, str] | None = None,
) -> Response:
    entry = await read(session, catalog.model_entry, session, model)
    page = PromptPage(entry, Lab(), (), None, saved=kept)
    try:
        lab = lab_of(values)
        page = replace(page, lab=lab)
        chosen = choose(entry, lab)
        focus = next((s for s in chosen if s.name == lab.on), chosen[0] if chosen else None)
        changed = tuple(s.name for s in chosen if hashes and hashes.get(s.name) != s.sae_hash)
        page = replace(page, sources=chosen, focus=focus, changed=changed)
        if focus is not None and not lab.empty:
            visits.note(request, [source.id for source in page.sources], "use")
            page = await _read(page, focus, session, settings, worker)
    except AtlasError as error:
        page = replace(page, problem=of(error))
    status = page.problem.status if page.problem else 200
    if not partial(request):
        return render(request, "prompt.html", page, status=status, headers=dict(_HEADERS))
    headers = {"hx-push-url": page.address} if len(page.address) <= MAX_ADDRESS and status == 200 else {}
    return render(request, "_reading.html", page, headers=_HEADERS | headers)


async def _read(
    page: PromptPage, source: SourceCard, session: Session, settings: Settings, worker: Worker
) -> PromptPage:
    """Return the page with its reading, or with what is being loaded."""
    lab, model = page.lab, catalog.model_ref(settings, page.entry.card.id)
    texts = [] if lab.kind == "chat" else texts_of(settings, lab.texts())
    waiting = await worker.loading(model, [catalog.sae_ref(settings, s) for s in page.sources])
    if waiting:
        return replace(page, loading=tuple(waiting))
    if lab.kind == "chat":
        messages = [ChatMessage(role=role, content=say) for role, say in lab.messages]
        last = bool(messages) and messages[-1].role != "assistant"
        reply = await worker.chat(ChatRequest(model=model, messages=messages, add_generation_prompt=last))
        texts = texts_of(settings, [reply.text])
    nr = min(lab.nr, len(texts))
    page = replace(page, texts=tuple(texts), lab=replace(lab, nr=nr))
    queries = [_query(settings, s, page) for s in page.sources]
    reply = await worker.encode(
        EncodeRequest(model=model, texts=texts, queries=queries, prepend_bos=source.prepend_bos)
    )
    return replace(page, reading=await _reading(page, source, reply, session, settings, worker))


def _query(settings: Settings, source: SourceCard, page: PromptPage) -> SaeQuery:
    lab = page.lab
    asked = [index for name, index in lab.pinned() if name == source.name and index < source.d_sae]
    top = 1
    if page.focus is not None and source.id == page.focus.id:
        if lab.feature is not None and lab.feature < source.d_sae:
            asked = [lab.feature, *asked]
        top = min(int(source.config.get("k") or MAX_ACTIVE), source.d_sae)
    return SaeQuery(sae=catalog.sae_ref(settings, source), top_k=top, latents=asked, totals=True)


async def _reading(
    page: PromptPage, source: SourceCard, reply: EncodeReply, session: Session, settings: Settings, worker: Worker
) -> Reading:
    lab, place = page.lab, page.sources.index(source)
    seen = {i for text in reply.texts for top in text.saes[place].top_indices for i in top}
    own = [index for name, index in lab.pinned() if name == source.name and index < source.d_sae]
    chosen = lab.feature if lab.feature is not None and lab.feature < source.d_sae else None
    wanted = seen | set(own) | ({chosen} if chosen is not None else set())
    rows = await read(session, catalog.rows, session, source, wanted)
    words = catalog.vocabulary_of(settings, page.entry.card.id)
    bos = page.entry.card.bos_token_id
    focuses = [
        Focus(lab, source, text, text.saes[place], words.strings(text.ids), reading.hidden_of(text, bos, lab), rows)
        for text in reply.texts
    ]
    focus = focuses[lab.nr - 1]
    close = closer.Closer(settings, worker, page.entry.card.id, source, page.texts[lab.nr - 1], focus, words)
    scores = await _scores(close, session)
    found, n_features = reading.ranked(focus, scores)
    position = lab.position if lab.position is not None and lab.position < len(focus.strings) else None
    full = rows[chosen].max_act if chosen is not None and chosen in rows else 0.0
    asked = 0 if chosen is not None else None
    selected = set(lab.selected(len(focus.strings))) if lab.select.strip() else set[int]()
    tops = [reading.strip(f, n, None, asked, full, ()).max for n, f in enumerate(focuses, 1)]
    strips = tuple(
        reading.strip(f, n, position if n == lab.nr else None, asked, max(full, *tops), selected if n == lab.nr else ())
        for n, f in enumerate(focuses, 1)
    )
    shown = Reading(
        strips=strips,
        token=strips[lab.nr - 1].tokens[position] if position is not None else None,
        feature=focus.row(chosen) if chosen is not None else None,
        strengths=(),
        likeliest="",
        ranked=found,
        n_features=n_features,
        score=reading.HEADINGS[lab.sort],
        cut=_cut(focus),
        pins=await read(session, _pins, page, session, reply, focus),
    )
    return await close.look(shown, page.sources)


async def _scores(close: closer.Closer, session: Session) -> Mapping[int, float] | None:
    """What features are sorted by, where it is not their maximum."""
    focus = close.focus
    match focus.lab.sort:
        case "max":
            return None
        case "sum":
            return reading.sums(focus, focus.lab.selected(len(focus.strings)))
        case "density":
            return reading.density_weighted(focus)
        case "quantile":
            indices = reading.maxima(focus)
            evidence = await read(session, prompts.evidence_of, session, focus.source, indices)
            return reading.quantiles(focus, evidence)
        case "loss":
            return await close.loss_effects()


def _cut(focus: Focus) -> int:
    looked = max((len(row) for row in focus.acts.top_indices), default=0)
    return looked if any(n > len(row) for n, row in zip(focus.acts.l0, focus.acts.top_indices, strict=True)) else 0


def _pins(page: PromptPage, session: Session, reply: EncodeReply, focus: Focus) -> tuple[reading.Pinned, ...]:
    """The rows of pinned features on the text looked at, whichever of the chosen sources they are of."""
    lab, text = page.lab, reply.texts[page.lab.nr - 1]
    found: list[reading.Pinned] = []
    for source, acts in zip(page.sources, text.saes, strict=True):
        indices = [index for name, index in lab.pinned() if name == source.name and index < source.d_sae]
        rows = catalog.rows(session, source, indices)
        is_focus = page.focus is not None and source.id == page.focus.id
        first = int(is_focus and lab.feature is not None and lab.feature < source.d_sae)
        own = replace(focus, source=source, acts=acts, rows=rows)
        for n, index in enumerate(indices):
            strip = reading.strip(own, lab.nr, lab.position, first + n, own.row(index).max_act, ())
            found.append(reading.Pinned(source.name, own.row(index), f"{source.path}/{index}", strip))
    return tuple(found)
