"""Evidence into windows, shades and charts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app import present
from app.evidence import Example
from app.tokens import Vocabulary
from app.web.markup import chip, label, shown, token, token_chip
from tests.conftest import TOKENS, dead_evidence, live_evidence

WORDS = Vocabulary(TOKENS)
CONTEXT = [0, 1, 2, 3, 4, 5, 6, 7]


def example(positions: list[int], values: list[float], context: int = 0) -> Example:
    return Example(context, np.array(positions), np.array(values))


def window(found: Example, width: int = 16, full: float = 10.0, bos: int | None = 0) -> present.Window:
    return present.window_of(found, CONTEXT, WORDS, width, full, bos)


@pytest.mark.parametrize(
    ("value", "full", "shade"),
    [
        (0, 10, 0),
        (-1, 10, 0),
        (0.001, 10, 1),
        (1, 10, 1),
        (1.01, 10, 2),
        (10, 10, 10),
        (11, 10, 10),
        (5, 0, 0),
        (float("nan"), 1, 0),
    ],
)
def test_shades_are_equal_bands_above_zero(value: float, full: float, shade: int) -> None:
    assert present.level(value, full) == shade


def test_a_window_joins_to_its_text_without_the_first_token() -> None:
    assert window(example([2], [5.0])).text == "The harbour is cold\n ships sail"


def test_a_window_shows_the_first_token_where_the_model_has_none_to_begin_with() -> None:
    assert window(example([2], [5.0]), bos=None).text.startswith("<|endoftext|>The")


def test_a_window_is_cut_around_its_peak() -> None:
    found = window(example([2, 4], [1.0, 5.0]), width=1)
    assert found.text == " is cold\n"
    assert found.cut_before
    assert found.cut_after


def test_active_tokens_stand_alone_with_value_position_and_id() -> None:
    piece = next(p for p in window(example([2, 5], [1.0, 5.0])).pieces if p.level)
    assert (piece.text, piece.level, piece.tip) == (" harbour", 1, "1.00 · position 2 · token 2")


def test_only_the_peak_is_marked_as_peak() -> None:
    assert [p.text for p in window(example([2, 5], [1.0, 5.0])).pieces if p.peak] == ["\n"]


def test_a_character_cut_across_tokens_is_whole_at_the_edge_of_a_window() -> None:
    context = [0, 1, 14, 15, 2]
    found = present.window_of(example([3], [1.0]), context, WORDS, 0, 1.0, 0)
    assert found.text == "€"


def test_an_active_token_without_text_says_what_it_is() -> None:
    found = present.window_of(example([2], [1.0]), [0, 1, 14, 15, 2], WORDS, 0, 1.0, 0)
    assert [(piece.text, piece.tip) for piece in found.pieces] == [
        ("", "1.00 · position 2 · token 14 · part of the next character")
    ]


def test_a_token_without_text_is_seen() -> None:
    assert token("") == token_chip("") == '<i class="part" title="part of the next character">⋯</i>'
    assert (token(" sea"), token_chip(" sea")) == (shown(" sea"), chip(" sea"))


def test_windows_that_read_the_same_are_folded_under_the_first() -> None:
    windows = [window(example([2], [v], context=c)) for c, v in ((0, 5.0), (1, 4.0))]
    other = window(example([4], [3.0]), width=1)
    shown_ = present.fold([windows[0], other, windows[1]])
    assert [len(s.more) for s in shown_] == [1, 0]
    assert shown_[0].window.max == 5.0


def view(**options: object) -> present.FeatureView:
    stream = lambda row: CONTEXT  # noqa: E731
    return present.feature_view(live_evidence(3), WORDS, {}, stream, None, bos=0, **options)  # type: ignore[arg-type]


def test_interval_groups_carry_bounds_and_share() -> None:
    first = view().groups[0]
    assert (first.low, first.high, first.count) == (4.0, 5.0, 20)
    assert first.share == pytest.approx(20 / 103)


def test_a_band_is_filled_up_with_the_highest_examples_that_lie_in_it() -> None:
    found = live_evidence(3)
    bare = replace(found, intervals=tuple(replace(i, examples=()) for i in found.intervals))
    groups = present.feature_view(bare, WORDS, {}, lambda _row: CONTEXT, None, bos=0).groups
    values = [[w.max for s in g.shown for w in (s.window, *s.more)] for g in groups]
    assert values == [[5.0, 4.5], [4.0], [], [], []]


def test_shading_by_example_gives_every_example_a_darkest_token() -> None:
    assert all(max(p.level for p in s.window.pieces) == 10 for s in view(per_example=True).top)


def test_a_dead_feature_has_a_page_without_examples_or_charts() -> None:
    found = present.feature_view(dead_evidence(), WORDS, {}, lambda row: CONTEXT, None, bos=0)
    assert (found.kind, found.top, found.activations, found.logits) == ("dead", (), None, None)


def test_a_dense_feature_says_so() -> None:
    dense = replace(live_evidence(3), n_active=200)
    assert present.feature_view(dense, WORDS, {}, None, None, bos=0).kind == "dense"


def test_without_the_corpus_there_are_numbers_but_no_examples() -> None:
    found = present.feature_view(live_evidence(3), WORDS, {}, None, None, bos=0)
    assert not found.has_text
    assert found.top == ()
    assert found.positive[0].token == " sea"


def test_a_histogram_fits_its_box_and_shows_rare_values() -> None:
    chart = present.histogram(np.array([0, 100_000, 1]), -1.0, 2.0, "x", "tokens", "title")
    assert chart is not None
    assert chart.path == "M0 60V60.0H100.0V0.0H200.0V59.2H300.0V60Z"
    assert chart.zero == pytest.approx(100.0)
    assert chart.tallest == "100,000 tokens"


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_a_histogram_of_nothing_is_none(counts: list[int]) -> None:
    assert present.histogram(np.array(counts, dtype=int), 0.0, 1.0, "x", "y", "") is None


def test_densities_come_from_the_harvests_summary() -> None:
    chart = present.density_chart({"density_histogram": {"counts": [1.0, 2.0], "edges": [-4.0, -3.0, -2.0]}})
    assert chart is not None
    assert [tick.text for tick in chart.ticks] == ["0.010 %", "density, log scale", "1.00 %"]
    assert present.density_chart({}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123, "0.0012"),
        (0.5, "0.500"),
        (3.14159, "3.14"),
        (31.4159, "31.4"),
        (12345.6, "12,346"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_have_the_digits_that_matter(value: float, text: str) -> None:
    assert present.amount(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.5, "50.0 %"), (0.0123, "1.23 %"), (0.0001, "0.010 %"), (1e-6, "0.0001 %")]
)
def test_densities_are_readable_down_to_one_in_a_million(share: float, text: str) -> None:
    assert present.percent(share) == text


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("a<b>&", "a&lt;b&gt;&amp;"),
        ("a\nb", 'a<i class="nl">↵</i><i class="br">\n</i>b'),
        ("\t", '<i class="nl">⇥</i>'),
        ("\u202e", '<i class="nl">U+202E</i>'),
        ("\0<", '<i class="nl">U+0000</i>&lt;'),
        ("\u200b\u00a0", '<i class="nl">U+200B</i><i class="nl">U+00A0</i>'),
        ("{{7*7}} é 漢", "{{7*7}} é 漢"),
    ],
)
def test_model_text_is_escaped_and_nothing_in_it_is_invisible(text: str, markup: str) -> None:
    assert str(shown(text)) == markup


def test_spaces_at_a_tokens_ends_are_visible_in_lists() -> None:
    assert str(chip(" sea")) == '<i class="ws">·</i>sea'
    assert str(chip("  ")) == '<i class="nl">␣␣</i>'


def test_backticks_in_a_label_hold_tokens_and_stay_text() -> None:
    assert str(label("on ` <b>`!")) == 'on <code class="chip"><i class="ws">·</i>&lt;b&gt;</code>!'
