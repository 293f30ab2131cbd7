"""A job's page and the comparison of several: parts that are fetched again while the jobs move.

Each part has an id and a version. `/parts` is told which versions the browser has and answers with those parts alone
that have changed since, as HTML; the page itself holds all of them, and is complete without JavaScript.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, Response, StreamingResponse

from app import catalog, curves, harvests, jobs, looks, plots, runs, visibility
from app.catalog import SourceCard, parse_index
from app.curves import Warning
from app.errors import BadInput
from app.harvests import Gathered
from app.looks import Looks
from app.people import Role
from app.plots import Plot
from app.present import amount, duration, percent
from app.readings import Reader
from app.runs import METRICS, Run, View
from app.settings import Settings
from app.tables import Job, JobState
from app.web.access import GUEST, VIEWER, actor_of
from app.web.harvests import address
from app.web.jobcards import JobCard, LogLine, card, log_lines, places
from app.web.pages import Config, Db, own_session, query, render
from app.web.sharing import Sharing, sharing_of
from app.web.source import Metric, facts, metrics

router = APIRouter()

MAX_COMPARED = 12
_LOG_LINES = 200


@dataclass(frozen=True)
class Part:
    """A piece of a page that is replaced when its version changes."""

    id: str
    template: str
    version: str
    make: Callable[[], Any]
    """Returns what the template shows; asked only when it is needed."""

    @property
    def page(self) -> Any:
        return self.make()


@dataclass(frozen=True)
class Head:
    """What a job is, how far it is, and what can be done with it."""

    job: JobCard
    numbers: tuple[tuple[str, str], ...]
    """Where a training is, in numbers."""
    again: str
    """The form filled in as this job was asked for; nothing where its kind has none."""
    evidence: tuple[Gathered, ...]
    """What it gathered, or has gathered so far."""
    n_warnings: int
    alert: str
    """The gravest warning; empty without one."""
    watched: bool
    """It is judged by its curves at all."""
    may_change: bool
    """Whoever looks may stop it, resume it or move it in the queue."""
    judged: bool
    """There are points to judge it by."""
    follows: str
    """What comes after it, in words; empty once it has ended."""


@dataclass(frozen=True)
class Row:
    """A run's line in the table, which is the legend of the plots too."""

    run: Run
    css: str
    shown: bool
    toggled: str
    """The address of the page with the run's line hidden, or shown again."""
    values: tuple[str, ...]
    source: SourceCard | None
    """The SAE, once it is in the catalog."""


@dataclass(frozen=True)
class Rows:
    columns: tuple[tuple[str, str], ...]
    """(heading, what it means)"""
    rows: tuple[Row, ...]
    compared: bool


@dataclass(frozen=True)
class Warned:
    """A run's warnings."""

    run: Run
    css: str
    warnings: tuple[Warning, ...]


@dataclass(frozen=True)
class Looking:
    looks: Looks
    path: str
    view: View
    first: int
    """The step after which the first comes; 0 where that is not known."""

    def link(self, **changes: Any) -> str:
        return self.path + at(self.view, **changes)

    @property
    def kept(self) -> tuple[tuple[str, str], ...]:
        """What the form must carry along so that the address keeps it."""
        return tuple(_pairs(self.view, sae=None, look=None))


@dataclass(frozen=True)
class Outcome:
    """What came of a training."""

    saes: tuple[Made, ...]
    lineage: tuple[tuple[str, str], ...]
    corpus: str
    harvest: Job | None
    """The harvest that it queued."""
    result: tuple[tuple[str, str], ...]
    """Of other kinds: what they tell."""


@dataclass(frozen=True)
class Made:
    """An SAE that a training put into the catalog."""

    source: SourceCard
    metrics: tuple[Metric, ...]
    evidence: tuple[Gathered, ...]


@dataclass(frozen=True)
class LogPage:
    path: str
    lines: tuple[LogLine, ...]


@dataclass(frozen=True)
class Switches:
    """How the plots are looked at, as links."""

    path: str
    view: View
    jobs: tuple[int, ...] = ()

    def link(self, **changes: Any) -> str:
        return self.path + at(self.view, self.jobs, **changes)


@dataclass(frozen=True)
class JobPage:
    job: Job
    spec: str
    moving: bool
    parts: Mapping[str, Part]
    plots: tuple[Part, ...]
    switches: Switches
    address: str
    """Of the parts, as this page shows them."""
    sharing: Sharing | None


@dataclass(frozen=True)
class ComparePage:
    jobs: tuple[JobCard, ...]
    differences: tuple[tuple[str, tuple[str, ...]], ...]
    runs: tuple[Row, ...]
    moving: bool
    parts: Mapping[str, Part]
    plots: tuple[Part, ...]
    switches: Switches
    address: str

    def without(self, job_id: int) -> str:
        return "/jobs/compare" + query({"job": [job.id for job in self.jobs if job.id != job_id]})


class Watched(View):
    """A view, and what of it the browser has."""

    seen: str = Field("", max_length=20_000)
    """`id:version` of each part, with spaces."""


class Compared(View):
    job: list[str] = Field(default_factory=list[str], max_length=64)


class WatchedComparison(Compared):
    seen: str = Field("", max_length=20_000)


# What is asked ----------------------------------------------------------------------------------------------------


@router.get("/jobs/compare", dependencies=[VIEWER])
def compare_page(request: Request, session: Db, settings: Config, wanted: Annotated[Compared, Query()]) -> Response:
    """Several jobs' curves over each other, and in what their specs differ."""
    page = _comparison(request, session, settings, wanted)
    return render(request, "jobs_compare.html", page)


@router.get("/jobs/compare/parts", dependencies=[VIEWER])
def compare_parts(
    request: Request, session: Db, settings: Config, wanted: Annotated[WatchedComparison, Query()]
) -> Response:
    page = _comparison(request, session, settings, wanted)
    return _changed(request, [*page.parts.values(), *page.plots], wanted.seen, page.moving)


@router.get("/jobs/{job_id}", dependencies=[GUEST])
def job_page(
    request: Request, job_id: str, session: Db, settings: Config, wanted: Annotated[View, Query()]
) -> Response:
    return render(request, "job.html", _page(request, session, settings, parse_index(job_id), wanted))


@router.get("/jobs/{job_id}/parts", dependencies=[GUEST])
def job_parts(
    request: Request, job_id: str, session: Db, settings: Config, wanted: Annotated[Watched, Query()]
) -> Response:
    """The parts of the page that changed since the browser got them."""
    page = _page(request, session, settings, parse_index(job_id), wanted)
    return _changed(request, [*page.parts.values(), *page.plots], wanted.seen, page.moving)


@router.get("/jobs/{job_id}/metrics.csv", dependencies=[GUEST])
def metrics_csv(request: Request, job_id: str, session: Db) -> Response:
    """All points of a job's curves, a line each; empty cells where a point has no such value."""
    job = jobs.get(session, parse_index(job_id))
    names = jobs.metric_names(session, job.id)

    def lines() -> Iterator[str]:
        with own_session(request) as own:  # the request's may be closed before the last line is sent
            yield _line(["step", *names])
            for step, values in jobs.points(own, job.id):
                yield _line([step, *(values.get(name, "") for name in names)])

    headers = {"content-disposition": f'attachment; filename="job-{job.id}-metrics.csv"'}
    return StreamingResponse(lines(), media_type="text/csv; charset=utf-8", headers=headers)


def _line(cells: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue()


def _changed(request: Request, parts: Sequence[Part], seen: str, moving: bool) -> Response:
    has = {part_id: version for part_id, _, version in (pair.rpartition(":") for pair in seen.split())}
    pages, actor = request.app.state.pages, getattr(request.state, "actor", None)
    changed = {part.id: pages.text(part.template, part, actor) for part in parts if has.get(part.id) != part.version}
    return JSONResponse({"moving": moving, "parts": changed}, headers={"cache-control": "no-store"})


def at(view: View, jobs_: Sequence[int] = (), **changes: Any) -> str:
    """Return the query of a view with some of it changed; what is as usual is not in it."""
    return query({"job": list(jobs_)} | _merged(_pairs(view, **changes)))


def _merged(pairs: Iterator[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


def _pairs(view: View, **changes: Any) -> Iterator[tuple[str, str]]:
    usual = View()
    for name in View.model_fields:
        value = changes.get(name, getattr(view, name))
        if value in (None, "") or value == getattr(usual, name):
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            yield name, "true" if one is True else str(one)


# A job ------------------------------------------------------------------------------------------------------------


def _page(request: Request, session: Session, settings: Settings, job_id: int, view: View) -> JobPage:
    job = jobs.get(session, job_id)
    reader: Reader = request.app.state.readings
    found = runs.runs_of(job, reader.read(session, job_id))
    path, moving = f"/jobs/{job_id}", not JobState(job.state).ended
    directory = settings.job_dir(job_id)
    n_steps = runs.n_steps_of(job, directory, found)
    warned = tuple(_warned(found, n_steps)) if job.state != JobState.QUEUED else ()
    made = _made(session, job, found)
    top = _head(request, session, settings, job, found, warned)
    parts = [Part("job", "_job.html", _version((replace(top, evidence=()), _ids(top.evidence))), lambda: top)]
    if any(run.columns for run in found) or found[0].spec is not None:
        parts.append(_table(found, view, path, made))
    if found[0].spec is not None:
        parts += [
            _warnings(warned, top.judged),
            _looking(settings, found, view, path, job, n_steps),
        ]
    outcome = _outcome(session, job, made)
    parts.append(Part("outcome", "_outcome.html", _outcome_version(outcome), lambda: outcome))
    newest = jobs.last_line(session, job_id)
    log = Part("log", "_log.html", str(newest), lambda: LogPage(path, log_lines(session, job_id, _LOG_LINES)))
    parts.append(log)
    return JobPage(
        job=job,
        spec=json.dumps(job.spec, indent=2, ensure_ascii=False),
        moving=moving,
        parts={part.id: part for part in parts},
        plots=_plots(found, view),
        switches=Switches(path, view),
        address=f"{path}/parts{at(view)}",
        sharing=sharing_of(request, "job", job),
    )


def head_part(request: Request, session: Session, settings: Settings, job_id: int) -> Part:
    """Return the head alone, as it is swapped after something was done with the job."""
    return _page(request, session, settings, job_id, View()).parts["job"]


def _head(
    request: Request, session: Session, settings: Settings, job: Job, found: Sequence[Run], warned: Sequence[Warned]
) -> Head:
    gravest = next((warning for one in warned for warning in one.warnings), None)
    again = address(job.spec) if job.kind == "harvest" else f"/train?clone={job.id}" if job.kind == "train" else ""
    return Head(
        job=card(job, places(session, settings)),
        numbers=tuple(_numbers(job, found, jobs.seconds_left(session, job.id))),
        again=again,
        evidence=tuple(harvests.gathered(session, job_id=job.id)) if job.kind == "harvest" else (),
        n_warnings=sum(len(one.warnings) for one in warned),
        alert=gravest.text if gravest else "",
        watched=job.kind == "train",
        may_change=_may_change(request, job),
        judged=any(run.last_step for run in found),
        follows=_follows(job, found),
    )


def _follows(job: Job, found: Sequence[Run]) -> str:
    tokens = job.spec.get("harvest_tokens")
    if not found or found[0].spec is None or JobState(job.state).ended or not isinstance(tokens, int) or not tokens:
        return ""
    return f"After it comes a job of its own, which makes the dashboards from {tokens:,} tokens."


def _may_change(request: Request, job: Job) -> bool:
    who = actor_of(request)
    return visibility.may_change(who, job.owner) and who is not None and who.role != Role.VIEWER


def _numbers(job: Job, found: Sequence[Run], left: float | None) -> Iterator[tuple[str, str]]:
    if not found or found[0].spec is None:
        return
    first = found[0]
    known = (
        ("step", f"{first.last_step:,}" if first.last_step else None),
        ("tokens", _told(first.last("tokens"), plots.short)),
        ("tokens a second", _told(first.last("tokens_per_second"), lambda value: f"{value:,.0f}")),
        ("learning rate", _told(first.last("lr"), lambda value: f"{value:.2g}")),
        ("time left, with evaluation", _told(left, duration) if job.state == JobState.RUNNING else ""),
    )
    yield from ((name, "–" if value is None else value) for name, value in known if value != "")


def _told(value: float | None, say: Callable[[float], str]) -> str | None:
    return None if value is None else say(value)


def _table(found: Sequence[Run], view: View, path: str, made: Sequence[SourceCard], ids: Sequence[int] = ()) -> Part:
    named = {(source.model_id, source.name): source for source in made}
    rows = tuple(_row(run, found, view, path, ids, named) for run in found)
    training = any(run.spec is not None for run in found)
    if training:
        columns = tuple((metric.heading, metric.about) for metric in METRICS.values() if metric.in_table)
    else:
        columns = tuple((name.replace("_", " "), "") for name in _columns(found))
    table = Rows(columns, rows, bool(ids))
    return Part("runs", "_runs.html", _version([(r.run.key, r.shown, r.values, r.source) for r in rows]), lambda: table)


def _columns(found: Sequence[Run]) -> list[str]:
    training = any(run.spec is not None for run in found)
    if training:
        return [name for name, metric in METRICS.items() if metric.in_table]
    return list(dict.fromkeys(name for run in found for name in run.columns))


def _row(
    run: Run,
    found: Sequence[Run],
    view: View,
    path: str,
    ids: Sequence[int],
    named: Mapping[tuple[str, str], SourceCard],
) -> Row:
    hidden = [key for key in view.hide if key != run.key]
    shown = run.key not in view.hide
    toggled = path + at(view, ids, hide=[*hidden, run.key] if shown else hidden)
    values = tuple(_told(run.last(name), lambda v, n=name: _value(n, v)) or "–" for name in _columns(found))
    model = str(run.job.spec.get("model", ""))
    source = named.get((model, run.spec.source)) if run.spec else None
    return Row(run, plots.css(run.style), shown, toggled, values, source)


def _value(name: str, value: float) -> str:
    if name == "dead_fraction":
        return percent(value)
    return f"{value:.3f}" if name in METRICS and name != "l0" else amount(value)


def _warned(found: Sequence[Run], n_steps: int) -> Iterator[Warned]:
    for run in found:
        if told := runs.warnings_of(run, n_steps):
            yield Warned(run, plots.css(run.style), told)


def _warnings(warned: tuple[Warned, ...], judged: bool) -> Part:
    version = _version((judged, [(one.run.key, one.warnings) for one in warned]))
    return Part("warnings", "_warnings.html", version, lambda: (warned, judged))


def _plots(found: Sequence[Run], view: View) -> tuple[Part, ...]:
    drawn = runs.plots_of(found, view)
    return tuple(Part(f"plot-{p.id.replace('/', '-')}", "_plot.html", p.version, _same(p)) for p in drawn)


def _same(found: Plot) -> Callable[[], Plot]:
    return lambda: found


def _looking(settings: Settings, found: Sequence[Run], view: View, path: str, job: Job, n_steps: int) -> Part:
    job_id, every = job.id, job.spec.get("evaluate_every_steps")
    # A short training takes its only look at its end.
    first = min(every, n_steps) if isinstance(every, int) and n_steps else every
    specs = {run.spec.source: run.spec for run in found if run.spec}
    if view.sae and view.sae not in specs:
        raise BadInput(f"Job {job_id} trains no SAE called {view.sae[:60]!r}; it trains {', '.join(list(specs)[:8])}.")
    source = view.sae or next(iter(specs))
    directory = settings.job_dir(job_id)
    version = _version((source, view.look, first, curves.snapshot_steps(directory, source)))

    def make() -> Looking:
        found = looks.looks(directory, list(specs), source, view.look, specs[source].d_sae)
        return Looking(found, path, view, first if isinstance(first, int) else 0)

    return Part("looks", "_looks.html", version, make)


def _made(session: Session, job: Job, found: Sequence[Run]) -> tuple[SourceCard, ...]:
    names = [run.spec.source for run in found if run.spec is not None]
    return catalog.trained_by(session, job.id, str(job.spec.get("model")), names) if names else ()


def _outcome(session: Session, job: Job, made: Sequence[SourceCard]) -> Outcome:
    if not made:
        told = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in job.result.items() if k != "url"]
        return Outcome((), (), "", None, tuple(told))
    origin = made[0].origin
    saes = tuple(
        Made(
            source,
            tuple(metric for metric in metrics(source.metrics) if metric.about),
            tuple(harvests.gathered(session, source_id=source.id)),
        )
        for source in made
    )
    corpus = str((origin.get("corpus") or {}).get("name", ""))
    software = facts(origin.get("trained_with") or {})
    lineage = (("hours", str(origin.get("hours", "–"))), *software)
    names = [source.name for source in made]
    return Outcome(saes, lineage, corpus, jobs.harvest_after(session, job, names), ())


def _outcome_version(outcome: Outcome) -> str:
    made = [(one.source, one.metrics, _ids(one.evidence)) for one in outcome.saes]
    harvest = (outcome.harvest.id, outcome.harvest.state) if outcome.harvest else None
    return _version((made, outcome.lineage, outcome.corpus, harvest, outcome.result))


def _ids(evidence: Sequence[Gathered]) -> list[tuple[int, str, int]]:
    return [(r.harvest.id, str(r.harvest.state), r.harvest.n_tokens) for r in evidence]


def _version(value: Any) -> str:
    """Name the state of plain values; rows of the database would be told by where they lie in memory."""
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:10]


# Several jobs -----------------------------------------------------------------------------------------------------


def _comparison(request: Request, session: Session, settings: Settings, wanted: Compared) -> ComparePage:
    ids = list(dict.fromkeys(parse_index(number) for number in wanted.job))
    if len(ids) > MAX_COMPARED:
        raise BadInput(f"{len(ids)} jobs are too many to compare; {MAX_COMPARED} can be.")
    reader: Reader = request.app.state.readings
    found: list[Run] = []
    compared = [jobs.get(session, job_id) for job_id in ids]
    for job in compared:
        found += runs.runs_of(job, reader.read(session, job.id), len(found), among_others=True)
    if len(found) > runs.MAX_LINES:
        raise BadInput(f"These jobs train {len(found)} SAEs together; {runs.MAX_LINES} can be compared.")
    view = View.model_validate(wanted.model_dump(include=set(View.model_fields)))
    made = [source for job in compared for source in _made(session, job, [run for run in found if run.job is job])]
    path = "/jobs/compare"
    table = _table(found, view, path, made, ids)
    where = places(session, settings)
    rows: Rows = table.page
    return ComparePage(
        jobs=tuple(card(job, where) for job in compared),
        differences=tuple(runs.differences([_spec(run) for run in found])),
        runs=rows.rows,
        moving=any(not JobState(job.state).ended for job in compared),
        parts={"runs": table} if found else {},
        plots=_plots(found, view) if found else (),
        switches=Switches(path, view, tuple(ids)),
        address=f"{path}/parts{at(view, ids)}",
    )


def _spec(run: Run) -> dict[str, Any]:
    """What a run was asked to do: its job's spec, with its own SAE's fields alone."""
    if run.spec is None:
        return dict(run.job.spec)
    asked = runs.spec_of(run.job)
    common = asked.model_dump(mode="json", exclude={"saes"}) if asked else {}
    return {**common, **run.spec.model_dump(mode="json", exclude_none=True)}
