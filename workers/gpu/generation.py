"""Many texts generated at once, one token of each at a time; runs join and leave between tokens.

A `Run` is what one request asked for: rows (default, steered, ...) times samples. Its prompts are read by a `Prefill`,
piece by piece; then its rows join the `Batch` of their model, where each row has its own interventions, position,
random numbers and end. No queue, no HTTP: workers.gpu.lane takes turns.

What is computed once: rows of a run that are alike (strength 0 is the default row), a prompt that several rows share up
to the first layer that one of them steers, and all of it where the prompt is not steered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from app.protocol import GenerateRequest, Token
from app.tokens import Vocabulary
from workers.gpu.cache import RowCache
from workers.gpu.interventions import Applied, Intervention, applied, edits
from workers.gpu.sampling import Sampler, Settings, choose
from workers.language_model import Edit, LanguageModel

PREFILL_TOKENS = 512
"""Prompts are read in pieces, so that a long one neither holds the lane nor survives its client."""

Interventions = tuple[Intervention, ...]


class NotFinite(ArithmeticError):
    """The logits overflowed; the message says what to do."""


@dataclass(eq=False)
class Grown:
    """A token that a row has grown by, before it is told of under the row's names."""

    sample: int
    id: int
    logprob: float
    top: list[tuple[int, float]]
    keep: int | None = None
    """See app.protocol.Token."""


@dataclass(eq=False)
class Row:
    """One text that grows. It may be shown under several names, where rows of a run are alike."""

    names: list[str]
    sample: int
    n_prompt: int
    ids: list[int]
    interventions: Interventions
    sampler: Sampler
    held: list[Grown] = field(default_factory=list[Grown])
    """Tokens that may turn out to be the beginning of a stop string."""

    @property
    def n_new(self) -> int:
        return len(self.ids) - self.n_prompt


class Run:
    """One request's rows. `prompts` and `interventions` belong to the request's rows, in their order."""

    def __init__(
        self,
        language: LanguageModel,
        asked: GenerateRequest,
        prompts: Sequence[Sequence[int]],
        interventions: Sequence[Interventions],
        words: Vocabulary | None = None,
    ) -> None:
        self.language = language
        self.asked = asked
        self.finish: list[tuple[str, int, str]] = []
        self.stops = stop_ids(language)
        self.words = words
        """Needed for stop strings alone."""
        self.rows = _rows(asked, prompts, interventions)
        self.n_rows = len(self.rows)
        self._alive = len(self.rows)

    @property
    def done(self) -> bool:
        return self._alive == 0

    @property
    def n_tokens(self) -> int:
        """Positions its part of the KV cache may come to."""
        return self.n_rows * (max(row.n_prompt for row in self.rows) + self.asked.max_new_tokens)

    def take(self, row: Row, token: int, logprob: float, top: list[tuple[int, float]]) -> tuple[list[Grown], bool]:
        """Give a row its next token; return what can be shown of it by now, and whether the row goes on."""
        if token in self.stops:
            return self._end(row, "eos"), False
        row.ids.append(token)
        row.sampler.took(token)
        grown = Grown(row.sample, token, logprob, top)
        if not self.asked.stop:
            shown = [grown]
        else:
            shown, stopped = self._hold(row, grown)
            if stopped:
                return shown + self._end(row, "stop"), False
        if row.n_new == self.asked.max_new_tokens:
            return shown + self._end(row, "length"), False
        return shown, True

    def _hold(self, row: Row, grown: Grown) -> tuple[list[Grown], bool]:
        """Keep back what may be part of a stop string; cut the text where one begins."""
        assert self.words is not None
        row.held.append(grown)
        strings = self.words.strings(row.ids[row.n_prompt :])
        starts = [0, *accumulate(map(len, strings))]
        text, first = "".join(strings), len(strings) - len(row.held)
        begins = min((at for stop in self.asked.stop if (at := text.find(stop)) >= 0), default=-1)
        if begins >= 0:
            shown = [token for n, token in enumerate(row.held, first) if starts[n] < begins]
            if shown:
                shown[-1].keep = begins - starts[first + len(shown) - 1]
            row.held = []
            return shown, True
        # A character that is not complete yet may become part of one, too.
        text = text.rstrip("\ufffd")
        safe = len(text) - max(_overlap(text, stop) for stop in self.asked.stop)
        n_safe = sum(starts[n + 1] <= safe for n in range(first, len(strings)))
        shown, row.held = row.held[:n_safe], row.held[n_safe:]
        return shown, False

    def _end(self, row: Row, why: str) -> list[Grown]:
        self._alive -= 1
        self.finish += [(name, row.sample, why) for name in row.names]
        held, row.held = row.held, []
        return held


def _rows(
    asked: GenerateRequest, prompts: Sequence[Sequence[int]], interventions: Sequence[Interventions]
) -> list[Row]:
    found: dict[tuple[tuple[int, ...], tuple[int, ...], int], Row] = {}
    for sample in range(asked.n_samples):
        for row, ids, wanted in zip(asked.rows, prompts, interventions, strict=True):
            acting = tuple(i for i in wanted if not i.neutral)
            key = (tuple(ids), tuple(map(id, acting)), sample)
            if key in found:
                found[key].names.append(row.name)
                continue
            sampler = Sampler(Settings.of(asked), asked.seed, sample, ids)
            found[key] = Row([row.name], sample, len(ids), list(ids), acting, sampler)
    return list(found.values())


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Prefill:
    """Reads a run's prompts. `step` until `done`; then `caches` and `logits` hold what its rows begin with."""

    def __init__(self, run: Run) -> None:
        self.run = run
        groups: dict[tuple[int, ...], list[Row]] = {}
        for row in run.rows:
            groups.setdefault(tuple(row.ids), []).append(row)
        self._prompts = [_Prompt(run.language, list(ids), rows) for ids, rows in groups.items()]

    @property
    def done(self) -> bool:
        return all(prompt.left == 0 for prompt in self._prompts)

    @torch.inference_mode()
    def step(self) -> None:
        """Read one piece of one prompt."""
        next(prompt for prompt in self._prompts if prompt.left).step()

    def rows(self) -> list[Row]:
        return [row for prompt in self._prompts for row in prompt.rows]

    def logits(self) -> Tensor:
        """After the last token of each row's prompt: [row, d_vocab], float32."""
        return torch.cat([prompt.logits[prompt.place] for prompt in self._prompts])

    def caches(self) -> list[tuple[RowCache, list[int]]]:
        return [(prompt.cache, prompt.place) for prompt in self._prompts]


class _Prompt:
    """A prompt and the rows that begin with it. Rows that steer it alike are read as one."""

    def __init__(self, language: LanguageModel, ids: list[int], rows: list[Row]) -> None:
        self.rows = rows
        self.cache = RowCache()
        self.logits = torch.empty(0)
        self._language = language
        self._ids = ids
        self._at = 0
        ways: dict[tuple[int, ...], Interventions] = {}
        keys = [self._steering(row) for row in rows]
        for acting in keys:
            ways.setdefault(tuple(map(id, acting)), acting)
        self._ways = list(ways.values())
        self.place = [list(ways).index(tuple(map(id, acting))) for acting in keys]
        """Which row of the cache and the logits belongs to each of `rows`."""

    @property
    def left(self) -> int:
        return len(self._ids) - self._at

    def step(self) -> None:
        piece = self._ids[self._at : self._at + PREFILL_TOKENS]
        device = self._language.device
        wanted = [
            found
            for row, acting in enumerate(self._ways)
            for what in acting
            if (found := applied(self._language.card, row, what, piece, self._at, len(self._ids), device)) is not None
        ]
        changes = edits(wanted, len(self._ways))
        if len(self._ways) > 1:
            changes = self._forked(changes)
        self._at += len(piece)
        # Like the rows of a batch, it is told its positions: not every architecture counts from the cache.
        positions = torch.arange(self._at - len(piece), self._at, device=device).unsqueeze(0)
        logits = forward(self._language, torch.tensor([piece], device=device), positions, None, self.cache, changes)
        self.logits = logits.expand(len(self._ways), -1)

    def _steering(self, row: Row) -> Interventions:
        card = self._language.card
        steers = [
            what
            for what in row.interventions
            if any(what.applies(card, token, at, len(self._ids)) for at, token in enumerate(self._ids))
        ]
        return tuple(steers)

    def _forked(self, changes: dict[str, Edit]) -> dict[str, Edit]:
        """Read the prompt as one row up to the first layer where the ways part, as many from there on."""
        hooks = [h for acting in self._ways for what in acting for h in (what.hook_name, what.reads) if h]
        layer = min(self._language.depth(hook)[0] for hook in hooks)
        name, n = f"blocks.{layer}.hook_resid_pre", len(self._ways)
        then = changes.get(name)

        def fork(h: Tensor) -> Tensor:
            h = h.expand(n, -1, -1).contiguous()
            return h if then is None else then(h)

        return {**changes, name: fork}


class Batch:
    """The rows of one model that are being generated."""

    def __init__(self, language: LanguageModel) -> None:
        self.language = language
        self._cache = RowCache()
        self._rows: list[tuple[Run, Row]] = []
        self._plan: tuple[tuple[object, ...], dict[str, Edit]] = ((), {})

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def runs(self) -> list[Run]:
        return list({id(run): run for run, _ in self._rows}.values())

    @torch.inference_mode()
    def join(self, prefill: Prefill) -> list[Token] | NotFinite:
        """Take in a run whose prompts have been read; return its first tokens."""
        run, rows = prefill.run, prefill.rows()
        [(_, outcome)], alive = _advance([(run, row) for row in rows], prefill.logits())
        staying = {id(row) for _, row in alive}
        caches = [
            (cache, kept)
            for (cache, places), own in zip(prefill.caches(), _split(rows, prefill.caches()), strict=True)
            if (kept := [place for place, row in zip(places, own, strict=True) if id(row) in staying])
        ]
        if caches:
            self._cache.join(caches)
            self._rows += alive
        return outcome

    @torch.inference_mode()
    def step(self) -> list[tuple[Run, list[Token] | NotFinite]]:
        """Generate one token of every row; return each run's."""
        logits = self._forward()
        outcomes, alive = _advance(self._rows, logits)
        if len(alive) < len(self._rows):
            self._keep([n for n, (_, row) in enumerate(self._rows) if any(row is kept for _, kept in alive)])
        return outcomes

    @torch.inference_mode()
    def drop(self, run: Run) -> None:
        """Free the rows of a run that nobody reads any more."""
        self._keep([n for n, (other, _) in enumerate(self._rows) if other is not run])

    def _forward(self) -> Tensor:
        rows = [row for _, row in self._rows]
        device = self.language.device
        lengths = [len(row.ids) - 1 for row in rows]  # cached; the last token is what is read now
        longest = max(lengths)
        mask = None
        if min(lengths) < longest:
            padding = torch.tensor([[longest - n] for n in lengths], device=device)
            mask = (torch.arange(longest + 1, device=device) >= padding).long()
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[n] for n in lengths], device=device)
        return forward(self.language, ids, positions, mask, self._cache, self._edits(rows))

    def _edits(self, rows: list[Row]) -> dict[str, Edit]:
        """What steers the tokens read now; made anew only when that changes."""
        card = self.language.card
        wanted = [
            Applied(n, what, None)
            for n, row in enumerate(rows)
            for what in row.interventions
            if what.applies(card, row.ids[-1], len(row.ids) - 1, row.n_prompt)
        ]
        key = (len(rows), *((item.row, item.what) for item in wanted))
        if key != self._plan[0]:
            self._plan = (key, edits(wanted, len(rows)))
        return self._plan[1]

    def _keep(self, places: list[int]) -> None:
        self._rows = [self._rows[n] for n in places]
        if not places:
            self._cache = RowCache()
            return
        longest = max(len(row.ids) - 1 for _, row in self._rows)
        self._cache.select(places, self._cache.get_seq_length() - longest)


def forward(
    language: LanguageModel,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: RowCache,
    changes: dict[str, Edit],
) -> Tensor:
    """Logits after the last position: [row, d_vocab], float32."""
    named = {language.cache_argument: cache}
    with language.edited(changes):
        output = language.hf(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, logits_to_keep=1, **named
        )
    return output.logits[:, -1].float()


def _advance(
    rows: Sequence[tuple[Run, Row]], logits: Tensor
) -> tuple[list[tuple[Run, list[Token] | NotFinite]], list[tuple[Run, Row]]]:
    """Choose each row's next token: what each run shows of it, and the rows that go on."""
    totals = logits.logsumexp(-1)
    chosen = choose(logits, [row.sampler for _, row in rows])
    own = (logits[range(len(chosen)), chosen] - totals).tolist()
    tops = _tops(logits, totals, [run.asked.n_logprobs for run, _ in rows])
    failed = {id(run) for (run, _), finite in zip(rows, totals.isfinite().tolist(), strict=True) if not finite}
    found: dict[int, tuple[Run, list[tuple[str, Grown]]]] = {}
    alive: list[tuple[Run, Row]] = []
    for (run, row), token, logprob, top in zip(rows, chosen, own, tops, strict=True):
        events = found.setdefault(id(run), (run, []))[1]
        if id(run) in failed:
            continue
        shown, goes_on = run.take(row, token, logprob, top)
        events += [(name, grown) for grown in shown for name in row.names]
        if goes_on:
            alive.append((run, row))
    words = "The model's logits are no longer finite; lower the strength of the steering."
    return [
        (run, NotFinite(words) if key in failed else _tokens(events)) for key, (run, events) in found.items()
    ], alive


def _tokens(events: list[tuple[str, Grown]]) -> list[Token]:
    """What a step has made of one run. Not validated: every token of every row comes through here."""
    last = len(events) - 1
    return [
        Token.model_construct(
            row=name, sample=one.sample, id=one.id, logprob=one.logprob, top=one.top, more=n < last, keep=one.keep
        )
        for n, (name, one) in enumerate(events)
    ]


def _tops(logits: Tensor, totals: Tensor, wanted: list[int]) -> list[list[tuple[int, float]]]:
    if not any(wanted):
        return [[] for _ in wanted]
    values, ids = (logits - totals.unsqueeze(-1)).topk(min(max(wanted), logits.shape[-1]), dim=-1)
    return [list(zip(i[:n], v[:n], strict=True)) for n, i, v in zip(wanted, ids.tolist(), values.tolist(), strict=True)]


def _split(rows: list[Row], caches: list[tuple[RowCache, list[int]]]) -> list[list[Row]]:
    """The rows of each prompt's cache."""
    parts: list[list[Row]] = []
    at = 0
    for _, places in caches:
        parts.append(rows[at : at + len(places)])
        at += len(places)
    return parts


def stop_ids(language: LanguageModel) -> frozenset[int]:
    """Tokens that end a text: those of the model's generation config and its tokenizer's own."""
    config = language.hf.generation_config
    named = config.eos_token_id if config is not None else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*ids, language.tokenizer.eos_token_id] if i is not None)


def kv_bytes(language: LanguageModel) -> int:
    """What one position of one row takes in the KV cache."""
    config = language.hf.config
    heads = getattr(config, "num_key_value_heads", None) or language.card.n_heads
    d_head = getattr(config, "head_dim", None) or language.card.d_head
    return 2 * language.card.n_layers * heads * d_head * language.dtype.itemsize
