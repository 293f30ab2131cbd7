"""A training before it starts: whether it can be, and what it will take. Takes a Session; the caller commits.

Page, API and command line ask here, so they refuse the same specs in the same words.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import catalog, corpora, harvestplan, jobs, present, trainplan, visibility
from app.catalog import ModelEntry
from app.errors import AtlasError, BadInput
from app.harvestplan import Shape
from app.protocol import ModelCard
from app.settings import Settings
from app.specs import CorpusSpec, HarvestSpec
from app.tables import Corpus, Job, JobState, Source
from app.trainplan import Estimate, Speed
from app.trainspecs import HOOK_PATTERN, HOOKS, PLAIN_PATTERN, RESAMPLING_ENDS, SET_PATTERN, SaeSpec, TrainSpec
from app.visibility import Visibility

KIND = "train"
CHARS_PER_TOKEN = 4
_TELLING_FLOPS = 1e9
"""Of a step: below, what a step costs is not its multiplications."""
PARALLEL = frozenset(
    {"GPTNeoXForCausalLM", "GPTJForCausalLM", "PhiForCausalLM", "FalconForCausalLM", "CohereForCausalLM"}
)
"""Architectures whose attention and MLP read the same residual, so that there is no hook between them."""
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_KINDS = {
    "int_parsing": "a whole number, in digits",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number, such as 0.001 or 1e-3",
    "float_type": "a number",
    "finite_number": "a finite number",
}
_PATTERNS = {
    HOOK_PATTERN: "such as blocks.12.hook_resid_post: a layer, then " + ", ".join(HOOKS),
    SET_PATTERN: "small letters, digits, - and _, beginning with a letter or digit, 64 at most",
    PLAIN_PATTERN: "a text in one line, without control characters",
}
_FIELDS = frozenset((*SaeSpec.model_fields, *TrainSpec.model_fields)) - {"saes"}
_GPU = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Fault:
    """Something wrong in a spec."""

    field: str
    """Of SaeSpec or TrainSpec; empty where it concerns the whole."""
    text: str


class BadSpec(BadInput):
    """A spec that cannot be trained; `faults` says why, field by field."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        shown = [f"{fault.field}: {fault.text}" if fault.field else fault.text for fault in self.faults[:5]]
        more = [f"And {len(self.faults) - 5} more."] if len(self.faults) > 5 else []
        super().__init__(" ".join([*shown, *more]))


@dataclass(frozen=True)
class Outlook:
    """What a training means before it starts."""

    spec: TrainSpec
    estimate: Estimate
    speed: Speed
    available: int
    """Tokens that the corpus has, held-out ones too."""
    counted: bool
    """They were counted; else guessed from the characters, the corpus not being tokenised yet."""
    free_bytes: int
    memory_limit: int
    """Of this machine, in bytes; 0 where the trainer computes on a GPU or elsewhere."""
    harvest: harvestplan.Estimate | None
    """Of the dashboards, whose job follows; None where none was asked for."""
    notes: tuple[str, ...]

    @property
    def whole_seconds(self) -> float:
        """Of everything until the dashboards are there."""
        after = self.harvest.seconds if self.harvest else 0.0
        return self.estimate.seconds + self.estimate.evaluation_seconds + after


def read(fields: Mapping[str, Any]) -> TrainSpec:
    """Return the spec that some fields make. Raises BadSpec with both numbers of each fault."""
    try:
        return TrainSpec.model_validate(dict(fields))
    except ValidationError as error:
        raise BadSpec(_faults(error)) from None


def outlook(session: Session, settings: Settings, spec: TrainSpec) -> Outlook:
    """Return what a training takes. Raises BadSpec for what the catalog or this machine does not allow."""
    entry, text = _catalogued(session, settings, spec)
    card, available, counted = entry.card, text.n_tokens, text.counted
    n_contexts = available // max(spec.context_size - (card.bos_token_id is not None), 1)
    n_train = int(n_contexts * (1 - spec.held_out))
    speed = trainplan.measured_speed(job.result for job in _finished(session) if _is_telling(session, job))
    takes = trainplan.estimate(spec, card, settings.cache_bytes, speed, n_train)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.data_dir).free
    memory = memory_limit(session, settings)
    faults = [*_too_little(spec, n_train), *_too_much(takes, free - text.n_bytes, memory)]
    if faults:
        raise BadSpec(faults)
    harvest = _harvest(session, settings, spec, card, text)
    notes = (
        *text.notes,
        *_notes(session, settings, spec, entry, n_train),
        *_late(spec, takes.steps),
        *_after(takes, harvest, free, memory),
    )
    return Outlook(spec, takes, speed, available, counted, free, memory, harvest, notes)


def harvest_of(spec: TrainSpec) -> HarvestSpec | None:
    """Return the harvest that a training queues at its end; None for none."""
    if not spec.harvest_tokens:
        return None
    asked = {"model": spec.model, "corpus": spec.corpus, "sources": tuple(sae.source for sae in spec.saes)}
    sizes = {"n_tokens": spec.harvest_tokens, "context_size": spec.context_size}
    return HarvestSpec.model_validate({**asked, **sizes})


def _harvest(
    session: Session, settings: Settings, spec: TrainSpec, card: ModelCard, text: _Text
) -> harvestplan.Estimate | None:
    asked = harvest_of(spec)
    if asked is None:
        return None
    shapes = [
        Shape(sae.layer, trainplan.hook_width(sae.hooks[0], card), sae.d_sae, sae.k or harvestplan.usual_l0(sae.d_sae))
        for sae in spec.saes
    ]
    # By then the training has tokenised the corpus.
    return harvestplan.foreseen(session, settings, asked, card, shapes, text.n_tokens, counted=True)


def _after(takes: Estimate, harvest: harvestplan.Estimate | None, free: int, memory: int) -> Iterator[str]:
    """What may stop the harvest, once the training's own files are gone."""
    if harvest is None:
        return
    disk = harvest.working_disk_bytes + harvest.kept_disk_bytes + takes.sae_bytes
    if disk > free:
        yield (
            f"The dashboards would take {present.size(disk)} of disk; {present.size(free)} are free: lower "
            "harvest_tokens, or make room meanwhile."
        )
    if memory and harvest.memory_bytes > memory:
        yield (
            f"The dashboards would take {present.size(harvest.memory_bytes)} of memory; this machine has "
            f"{present.size(memory)}: set harvest_tokens to 0 and harvest fewer SAEs at a time."
        )


def queue(session: Session, settings: Settings, spec: TrainSpec) -> Job:
    """Queue a training. Raises BadSpec for one that cannot be."""
    outlook(session, settings, spec)
    private = spec.visibility == Visibility.PRIVATE or _replaces_private(session, spec)
    asked = spec.model_dump(mode="json", exclude_none=True)
    return jobs.submit(session, settings, KIND, spec.title, asked, private=private)


def _replaces_private(session: Session, spec: TrainSpec) -> bool:
    """Tell whether one of the SAEs takes the place of one that only its owner sees: the job's title would name it."""
    there = select(Source.id).where(Source.model_id == spec.model, Source.name.in_([sae.source for sae in spec.saes]))
    return session.scalar(there.where(Source.visibility == Visibility.PRIVATE).limit(1)) is not None


def memory_limit(session: Session, settings: Settings) -> int:
    """Return the memory of the machine that trains, where that is this one's processor; 0 where it is not known."""
    hosts = {beat.host for beat in jobs.trainers(session, settings)}
    on_gpu = settings.device not in ("auto", "cpu") or (
        settings.device == "auto" and any(path.exists() for path in _GPU)
    )
    if on_gpu or hosts - {socket.gethostname()}:
        return 0
    return machine_bytes()


def machine_bytes() -> int:
    """The memory of this machine, within the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = _MEMORY_LIMIT.read_text().strip() if _MEMORY_LIMIT.is_file() else "max"
    return total if allowed == "max" else min(total, int(allowed))


# What pydantic says, as sentences ----------------------------------------------------------------------------------


def _faults(error: ValidationError) -> list[Fault]:
    found: dict[tuple[str, str], Fault] = {}
    # Where an SAE is wrong, pydantic adds that there are too few of them.
    told = [fault for fault in error.errors() if fault["type"] != "too_short" or error.error_count() == 1]
    for fault in told:
        loc = [str(part) for part in fault["loc"]]
        text = _sentence(cast(dict[str, Any], fault))
        name = _field_of(loc, text)
        place = f"SAE {int(loc[1]) + 1}: " if len(loc) > 1 and loc[1].isdigit() and int(loc[1]) else ""
        found.setdefault((name, text), Fault(name, place + text))
    return list(found.values())


def _field_of(loc: list[str], text: str) -> str:
    """The field that a fault is about; one of several fields names itself in its sentence."""
    named = next((part for part in reversed(loc) if not part.isdigit() and part != "saes"), "")
    if named or loc == ["saes"]:
        return named[:60] or "saes"
    return next((word for word in re.findall(r"[a-z_0-9]+", text) if word in _FIELDS), "")


def _sentence(fault: Mapping[str, Any]) -> str:
    given, kind = fault["input"], str(fault["type"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = fault["ctx"][key]
        return f"It is {_shown(given)}; it must be {words} {bound:,}."
    if kind == "missing":
        return "It is missing."
    if kind == "extra_forbidden":
        return "There is no field of this name."
    if kind in _KINDS:
        return f"It is {_shown(given)}; it must be {_KINDS[kind]}."
    if kind == "string_pattern_mismatch":
        return f"It is {_shown(given)}; it must be {_PATTERNS.get(fault['ctx']['pattern'], 'another text')}."
    text = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    # A sentence that begins with a field's name keeps that as it is written.
    text = (text if text.partition(" ")[0] in _FIELDS else f"{text[:1].upper()}{text[1:]}")[:600]
    return f"{text}." if kind == "value_error" else f"{text}; it is {_shown(given)}."


def _shown(given: object) -> str:
    if isinstance(given, int) and not isinstance(given, bool):
        # Python refuses to write out numbers of more than 4300 digits.
        return f"{given:,}" if given.bit_length() <= 100 else f"a number of {given.bit_length():,} bits"
    if isinstance(given, str | float | bool):
        return repr(given) if len(repr(given)) <= 60 else repr(given)[:60] + "…"
    return {"list": "a list", "dict": "a mapping", "NoneType": "empty"}.get(type(given).__name__, "something else")


# What catalog and machine say to it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """What there is to read."""

    n_tokens: int
    counted: bool
    n_bytes: int = 0
    """Disk that it takes before it can be read."""
    notes: tuple[str, ...] = ()


def _catalogued(session: Session, settings: Settings, spec: TrainSpec) -> tuple[ModelEntry, _Text]:
    faults: list[Fault] = []
    entry = _or_fault(faults, "model", lambda: _model(session, settings, spec.model))
    wanted = _or_fault(faults, "corpus", lambda: corpora.dataset_asked(spec))
    text: _Text | None = None
    if entry is not None:
        faults += [*_misfits(spec, entry.card, settings), *_taken(session, settings, spec)]
    if not any(fault.field == "corpus" for fault in faults):
        card = entry.card if entry else None
        text = _or_fault(faults, "corpus", lambda: _text(session, settings, spec, wanted, card))
    if text is not None and text.n_bytes // 2 > settings.max_corpus_bytes:
        needs = f"The text for it is about {present.size(text.n_bytes // 2)}; a corpus may have"
        most = f"{present.size(settings.max_corpus_bytes)} (SAE_ATLAS_MAX_CORPUS_BYTES)."
        faults.append(Fault("n_tokens", f"{needs} {most}"))
    if faults or entry is None or text is None:
        raise BadSpec(faults)
    return entry, text


def _text(
    session: Session, settings: Settings, spec: TrainSpec, wanted: CorpusSpec | None, card: ModelCard | None
) -> _Text:
    """What a training will read. Raises NotFound or BadInput for a corpus that cannot be read."""
    stored = corpora.of_dataset(session, wanted) if wanted is not None else None
    if wanted is not None and stored is None:
        told = f"{wanted.dataset} is streamed from the hub first, {wanted.max_chars:,} characters into a corpus "
        # Text and tokens.
        return _Text(wanted.max_chars // CHARS_PER_TOKEN, False, 2 * wanted.max_chars, (f"{told}{wanted.name}.",))
    corpus = stored or corpora.corpus_named(session, _plain(spec.corpus))
    if card is None:
        return _Text(0, False)
    if not corpora.can_be_read(settings, corpus, card.tokenizer_hash):
        raise BadInput(f"{corpus.name} came as tokens of another tokenizer; {card.id} cannot read it. Add its text.")
    n_tokens, counted = _available(settings, corpus, card)
    return _Text(n_tokens, counted, notes=(f"{spec.corpus} is here as {corpus.name}.",) if stored else ())


def _model(session: Session, settings: Settings, model_id: str) -> ModelEntry:
    entry = catalog.model_entry(session, _plain(model_id))
    catalog.model_ref(settings, entry.card.id)  # raises where it has no weights here
    return entry


def _or_fault(faults: list[Fault], field: str, act: Any) -> Any:
    try:
        return act()
    except AtlasError as error:
        faults.append(Fault(field, error.message))
        return None


def _plain(text: str) -> str:
    """Without what no database takes: half characters and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def _misfits(spec: TrainSpec, card: ModelCard, settings: Settings) -> Iterator[Fault]:
    if spec.context_size > card.n_ctx:
        yield Fault("context_size", f"It is {spec.context_size:,} tokens; {card.id} reads {card.n_ctx:,}.")
    for name, hook in dict.fromkeys(pair for sae in spec.saes for pair in _named_hooks(sae)):
        layer = int(hook.split(".")[1])
        if layer >= card.n_layers:
            yield Fault(name, f"{hook} is in layer {layer:,}; {card.id} has layers 0 to {card.n_layers - 1}.")
        elif hook.endswith("hook_resid_mid") and card.architecture in PARALLEL:
            yield Fault(name, f"{card.id} has no {hook}: its attention and its MLP run side by side.")
    widest = max(sae.d_sae for sae in spec.saes)
    if widest > settings.max_d_sae:
        yield Fault("d_sae", f"It is {widest:,}; at most {settings.max_d_sae:,} here (SAE_ATLAS_MAX_D_SAE).")


def _taken(session: Session, settings: Settings, spec: TrainSpec) -> Iterator[Fault]:
    """Names that are others': the end of the training could not put its SAEs there (visibility.claim)."""
    names = [sae.source for sae in spec.saes]
    with visibility.unlimited(session):
        there = session.execute(
            select(Source.name, Source.owner).where(Source.model_id == spec.model, Source.name.in_(names))
        ).all()
    for name, owner in there:
        if owner not in ("", settings.owner_name):
            yield Fault("set_name", f"{spec.model}/{name} is {owner}'s already. Choose another, or ask them.")


def _named_hooks(sae: SaeSpec) -> Iterator[tuple[str, str]]:
    yield "hook_name", sae.hook_name
    if sae.hook_name_out is not None:
        yield "hook_name_out", sae.hook_name_out


def _available(settings: Settings, corpus: Corpus, card: ModelCard) -> tuple[int, bool]:
    """Tokens of the corpus for this model, and whether they were counted."""
    counted = {tokens.tokenizer_hash: tokens.n_tokens for tokens in corpora.tokens_of(settings, corpus)}
    known = counted.get(card.tokenizer_hash)
    return (corpus.n_chars // CHARS_PER_TOKEN, False) if known is None else (known, True)


def _too_little(spec: TrainSpec, n_train: int) -> Iterator[Fault]:
    most = n_train * trainplan.tokens_per_context(spec)
    if most < spec.batch_size:
        yield Fault("batch_size", f"A batch is {spec.batch_size:,} tokens; the corpus gives {most:,} to train on.")


def _too_much(takes: Estimate, free: int, memory: int) -> Iterator[Fault]:
    if takes.disk_bytes + takes.sae_bytes > free:
        needs = present.size(takes.disk_bytes + takes.sae_bytes)
        what = "lower n_tokens, or set cache to buffer" if takes.cached else "lower buffer_tokens or d_sae"
        yield Fault(
            "n_tokens" if takes.cached else "d_sae", f"It takes {needs} of disk; {present.size(free)} are free: {what}."
        )
    if memory and takes.memory_bytes > memory:
        needs = present.size(takes.memory_bytes)
        text = f"It takes {needs} of memory; this machine has {present.size(memory)}: lower d_sae, or train fewer SAEs."
        yield Fault("d_sae", text)


def _notes(session: Session, settings: Settings, spec: TrainSpec, entry: ModelEntry, n_train: int) -> Iterator[str]:
    yield from spec.notes
    most = n_train * trainplan.tokens_per_context(spec)
    if most < spec.n_tokens:
        yield f"The corpus gives {most:,} tokens to train on, fewer than the {spec.n_tokens:,} asked for: all are read."
    taken = {source.name: source.visibility for source in entry.sources}
    replaced = [sae.source for sae in spec.saes if sae.source in taken]
    if replaced:
        is_, it = ("is", "it") if len(replaced) == 1 else ("are", "them")
        yield f"{', '.join(replaced[:4])} {is_} in the catalog already: the end of this training replaces {it}."
    yield from _rivals(session, spec)
    if spec.visibility == Visibility.PRIVATE and (seen := [n for n in replaced if taken[n] != Visibility.PRIVATE]):
        yield f"{', '.join(seen[:4])}: seen by others already, and so afterwards; the page of an SAE changes that."
    if not spec.harvest_tokens:
        yield "harvest_tokens is 0: no dashboards are made at the end."
    if not jobs.trainers(session, settings):
        yield "No trainer is running: the job waits until `sae-atlas serve` starts one."


def _late(spec: TrainSpec, n_steps: int) -> Iterator[str]:
    """What a training is too short for: schedules are counted in steps, as in the papers that they are from."""
    share = max(n_steps // 20, 1)
    for name in ("l1_warmup_steps", "l0_warmup_steps", "warmup_steps"):
        asked = max((getattr(sae, name) or 0 for sae in spec.saes), default=0)
        if asked >= n_steps:
            what = "learning rate" if name == "warmup_steps" else "penalty"
            yield f"{name} is {asked:,} of {n_steps:,} steps: the {what} only rises. A twentieth would be {share:,}."
    resampled = [sae.resample_every_steps for sae in spec.saes if sae.treatment == "resample"]
    every = min((n for n in resampled if n), default=0)
    if every > RESAMPLING_ENDS * n_steps:
        yield (
            f"resample_every_steps is {every:,} of {n_steps:,} steps, and none happens in the last third: dead latents "
            "stay dead."
        )


def _rivals(session: Session, spec: TrainSpec) -> Iterator[str]:
    """Trainings that wait or run and end in the same places."""
    wanted = {sae.source for sae in spec.saes}
    going = select(Job).where(Job.kind == KIND, Job.state.in_([JobState.QUEUED, JobState.RUNNING, JobState.PAUSED]))
    for job in session.scalars(going.order_by(Job.id.desc()).limit(50)):
        if job.spec.get("model") != spec.model:
            continue
        try:
            both = sorted(wanted & {sae.source for sae in TrainSpec.model_validate(job.spec).saes})
        except ValidationError:
            continue  # asked for by another version
        if both:
            yield f"Job {job.id}, {job.state}, makes {', '.join(both[:4])} too: whichever ends last stays."


def _is_telling(session: Session, job: Job) -> bool:
    """Whether a training's steps took their time computing: those of tiny SAEs say little of others' speed."""
    try:
        spec = TrainSpec.model_validate(job.spec)
        card = catalog.model_entry(session, spec.model).card
    except (AtlasError, ValidationError):
        return False  # of a model that is gone, or asked for by another version
    return sum(trainplan.step_flops(sae, card) for sae in spec.saes) * spec.batch_size >= _TELLING_FLOPS


def _finished(session: Session) -> list[Job]:
    done = select(Job).where(Job.kind == KIND, Job.state == JobState.DONE)
    return list(session.scalars(done.order_by(Job.id.desc()).limit(10)))
