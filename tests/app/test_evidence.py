"""The evidence blob: what is packed comes back, old blobs stay readable, unknown ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.evidence import (
    VERSION,
    Effect,
    Example,
    FeatureEvidence,
    Interval,
    Silent,
    pack,
    pack_effects,
    read_varints,
    unpack,
    unpack_effects,
    varints,
)

BLOB_1 = Path(__file__).parent / "evidence_v1.bin"


def dead(n_tokens: int = 1000) -> FeatureEvidence:
    none = np.zeros(0)
    return FeatureEvidence(
        n_active=0,
        n_tokens=n_tokens,
        max_act=0.0,
        mean_act=0.0,
        histogram=none,
        top=(),
        intervals=(),
        top_logit_ids=none,
        top_logits=none,
        bottom_logit_ids=none,
        bottom_logits=none,
        logits_low=0.0,
        logits_high=0.0,
        logits_histogram=none,
        neighbours=none,
        cosines=none,
        correlated=none,
        pearson=none,
    )


def example(draw: st.DrawFn, max_act: float) -> Example:
    positions = sorted(draw(st.sets(st.integers(1, 127), min_size=1, max_size=8)))
    fractions = draw(st.lists(st.floats(0.01, 1.0), min_size=len(positions), max_size=len(positions)))
    return Example(draw(st.integers(0, 2**32 - 1)), np.array(positions), np.array(fractions) * max_act)


@st.composite
def evidences(draw: st.DrawFn) -> FeatureEvidence:
    max_act = draw(st.floats(0.5, 1000.0, width=32))
    bounds = np.linspace(max_act, 0.0, 6)
    intervals = tuple(
        Interval(bounds[i + 1], bounds[i], draw(st.integers(0, 1000)), tuple(_examples(draw, max_act, 3)))
        for i in range(5)
    )
    counts = draw(st.lists(st.integers(0, 2**32 - 1), max_size=50))
    ids = draw(st.lists(st.integers(0, 2**32 - 1), max_size=10))
    return FeatureEvidence(
        n_active=draw(st.integers(1, 2**40)),
        n_tokens=2**41,
        max_act=max_act,
        mean_act=max_act / 2,
        histogram=np.array(counts, dtype=np.int64),
        top=tuple(_examples(draw, max_act, 20)),
        intervals=intervals,
        top_logit_ids=np.array(ids, dtype=np.int64),
        top_logits=np.linspace(2, 1, len(ids)),
        bottom_logit_ids=np.array(ids[::-1], dtype=np.int64),
        bottom_logits=np.linspace(-2, -1, len(ids)),
        logits_low=-3.0,
        logits_high=4.0,
        logits_histogram=np.array(counts, dtype=np.int64),
        neighbours=np.array(ids, dtype=np.int64),
        cosines=np.linspace(1, 0, len(ids)),
        correlated=np.array(ids, dtype=np.int64),
        pearson=np.linspace(1, -1, len(ids)),
        logits_mean=0.25,
        logits_deviation=0.5,
        logits_skew=-1.5,
        logits_kurtosis=3.25,
        silent=tuple(draw(st.lists(st.builds(Silent, st.integers(0, 2**32 - 1), st.integers(0, 4095)), max_size=5))),
        hard_negatives=tuple(
            draw(
                st.lists(
                    st.builds(Silent, st.integers(0, 9000), st.integers(0, 127), st.none() | st.integers(0, 2**20 - 1)),
                    max_size=5,
                )
            )
        ),
    )


def _examples(draw: st.DrawFn, max_act: float, most: int) -> list[Example]:
    return [example(draw, max_act) for _ in range(draw(st.integers(0, most)))]


@given(evidences())
@settings(max_examples=60, deadline=None)
def test_what_is_packed_comes_back_with_activations_exact_to_a_65535th_of_the_maximum(before: FeatureEvidence) -> None:
    after = unpack(pack(before))
    assert (after.n_active, after.n_tokens, after.density) == (before.n_active, before.n_tokens, before.density)
    assert after.max_act == pytest.approx(before.max_act, rel=1e-6)
    assert after.histogram.tolist() == before.histogram.tolist()
    assert after.top_logit_ids.tolist() == before.top_logit_ids.tolist()
    np.testing.assert_allclose(after.pearson, before.pearson, atol=1e-3)
    _assert_same(after.top, before.top, before.max_act)
    assert (after.silent, after.hard_negatives) == (before.silent, before.hard_negatives)
    assert (after.logits_mean, after.logits_deviation) == (0.25, 0.5)
    assert (after.logits_skew, after.logits_kurtosis) == (-1.5, 3.25)
    tolerance = (before.logits_high - before.logits_low) / 131070 * 1.01
    np.testing.assert_allclose(after.top_logits, before.top_logits, atol=tolerance)
    np.testing.assert_allclose(after.bottom_logits, before.bottom_logits, atol=tolerance)
    assert len(after.intervals) == len(before.intervals)
    for mine, theirs in zip(after.intervals, before.intervals, strict=True):
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6)
        assert mine.count == theirs.count
        _assert_same(mine.examples, theirs.examples, before.max_act)


def _assert_same(after: tuple[Example, ...], before: tuple[Example, ...], max_act: float) -> None:
    assert [e.context for e in after] == [e.context for e in before]
    for mine, theirs in zip(after, before, strict=True):
        assert mine.positions.tolist() == theirs.positions.tolist()
        np.testing.assert_allclose(mine.values, theirs.values, atol=max_act / 131070 * 1.01)


def test_a_dead_feature_has_evidence_too() -> None:
    after = unpack(pack(dead()))
    assert (after.n_active, after.density, after.top, after.intervals) == (0, 0.0, (), ())


def test_a_blob_of_version_1_written_long_ago_is_still_read() -> None:
    after = unpack(BLOB_1.read_bytes())
    assert (after.n_active, after.n_tokens, after.max_act, after.mean_act) == (7, 1000, 8.0, 2.5)
    assert [(e.context, e.positions.tolist(), e.values.tolist()) for e in after.top] == [
        (42, [3, 5], [8.0, pytest.approx(4.0, abs=1e-4)])
    ]
    assert [(i.high, i.low, i.count, len(i.examples)) for i in after.intervals] == [(8.0, 4.0, 1, 0), (4.0, 0.0, 6, 1)]
    assert after.top[0].peak == 3
    assert after.neighbours.tolist() == [9, 4]


@given(st.lists(st.integers(0, 2**62), max_size=50))
def test_whole_numbers_of_any_size_come_back(numbers: list[int]) -> None:
    assert read_varints(varints(np.array(numbers, dtype=np.uint64))).tolist() == numbers


def test_causal_effects_come_back_with_every_token() -> None:
    before = (
        Effect(9, 3, 1.25, 0.5, ((49151, 0.25), (7, 0.125)), (), 8, -0.25, 0.0625),
        Effect(2**31, 126, float("nan"), 0.0, (), ((300, -0.5),)),
    )
    after = unpack_effects(pack_effects(before))
    assert str(after) == str(before)
    assert unpack_effects(pack_effects(())) == ()
    with pytest.raises(ValueError, match="effects of version 7; this SAE Atlas reads versions 1 to 2"):
        unpack_effects(b"SAEC\x07")


@pytest.mark.parametrize(("version", "later"), [(1, (0, float("nan"), float("nan"))), (2, (8, -0.25, 0.0625))])
def test_causal_effects_written_long_ago_are_still_read(version: int, later: tuple[float, ...]) -> None:
    blob = (Path(__file__).parent / f"effects_v{version}.bin").read_bytes()
    assert blob[4] == version
    first, second = unpack_effects(blob)
    assert str(first) == str(Effect(9, 3, 1.25, 0.5, ((49151, 0.25), (7, 0.125)), (), *later))  # type: ignore[arg-type]
    assert str(second) == str(Effect(2**31, 126, float("nan"), 0.0, (), ((300, -0.5),)))


def test_a_feature_with_forty_five_examples_stays_below_one_and_a_half_kilobytes() -> None:
    rng = np.random.default_rng(0)

    def sample() -> Example:
        positions = np.sort(rng.choice(np.arange(1, 128), 4, replace=False))
        return Example(int(rng.integers(9000)), positions, rng.random(4) * 9)

    bands = np.linspace(9, 0, 6)
    full = FeatureEvidence(
        n_active=5000,
        n_tokens=1_000_000,
        max_act=9.0,
        mean_act=2.0,
        histogram=rng.integers(0, 500, 50),
        top=tuple(sample() for _ in range(20)),
        intervals=tuple(Interval(bands[i + 1], bands[i], 100, tuple(sample() for _ in range(5))) for i in range(5)),
        top_logit_ids=rng.integers(0, 49152, 10),
        top_logits=rng.random(10),
        bottom_logit_ids=rng.integers(0, 49152, 10),
        bottom_logits=-rng.random(10),
        logits_low=-1.0,
        logits_high=1.0,
        logits_histogram=rng.integers(0, 5000, 50),
        neighbours=rng.integers(0, 4096, 10),
        cosines=rng.random(10),
        correlated=rng.integers(0, 4096, 10),
        pearson=rng.random(10),
    )
    assert len(pack(full)) < 1500


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"SAEV\x09rest", f"version 9; this SAE Atlas reads versions 1 to {VERSION}"),
        (b"PK\x03\x04", "not an evidence blob"),
    ],
)
def test_an_unknown_blob_is_refused(blob: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(blob)
