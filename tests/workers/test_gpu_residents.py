"""What is resident: loaded once, kept while used, evicted least recently used first, refused with both numbers."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import BadFile, NotFound, TooLarge, Unavailable
from app.protocol import ModelRef, SaeRef
from tests.tiny import D_IN, D_SAE, Tiny
from workers.checkpoints import Loaded
from workers.gpu import residents as residents_module
from workers.gpu.residents import LanguageModel, Residents, n_weights


def full(_n_weights: int) -> torch.dtype:
    return torch.float32


SAE_BYTES = 4 * (2 * D_IN * D_SAE + D_IN + D_SAE)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.fixture
def saes(tiny: Tiny, tmp_path: Path) -> list[SaeRef]:
    for name in "abc":
        shutil.copytree(tiny.topk.path, tmp_path / name)
    return [SaeRef(id=f"tiny/{name}", path=str(tmp_path / name)) for name in "abc"]


@pytest.fixture
def model_bytes(tiny: Tiny) -> int:
    return 4 * n_weights(Path(tiny.model.path))


def ids(residents: Residents) -> list[str]:
    return [resident.id for resident in residents.list()[0]]


def test_the_size_read_from_the_header_is_the_size_in_memory(tiny: Tiny, model_bytes: int) -> None:
    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        async with residents.hold(tiny.model, [tiny.topk]) as held:
            assert held.language.nbytes == model_bytes
            assert held.saes[tiny.topk.path].nbytes == SAE_BYTES
        assert residents.used_bytes == model_bytes + SAE_BYTES

    run(test)


def test_the_least_recently_used_leaves_first(tiny: Tiny, model_bytes: int, saes: list[SaeRef]) -> None:
    async def test() -> None:
        residents = Residents("cpu", full, model_bytes + 2 * SAE_BYTES)
        for sae in (saes[0], saes[1], saes[0], saes[2]):
            async with residents.hold(tiny.model, [sae]):
                pass
        assert ids(residents) == ["tiny/a", "tiny", "tiny/c"]

    run(test)


def test_what_a_request_holds_is_not_evicted_under_it(tiny: Tiny, model_bytes: int, saes: list[SaeRef]) -> None:
    async def test() -> None:
        residents = Residents("cpu", full, model_bytes + SAE_BYTES)
        async with residents.hold(tiny.model, [saes[0]]):
            with pytest.raises(Unavailable, match=r"tiny/b needs 7\.8 KiB, 0\.0 KiB free"):
                async with residents.hold(tiny.model, [saes[1]]):
                    pass
        async with residents.hold(tiny.model, [saes[1]]):
            assert ids(residents) == ["tiny", "tiny/b"]

    run(test)


def test_what_never_fits_is_refused_with_both_numbers(tiny: Tiny) -> None:
    async def test() -> None:
        residents = Residents("cpu", full, 50_000)
        with pytest.raises(TooLarge, match=r"tiny needs 121\.0 KiB, .* budget is 48\.8 KiB"):
            async with residents.hold(tiny.model, []):
                pass
        assert residents.used_bytes == 0

    run(test)


def test_requests_at_once_load_a_thing_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []
    load = residents_module.load_sae
    monkeypatch.setattr(residents_module, "load_sae", lambda path, **kept: loads.append(path) or load(path, **kept))

    async def test() -> None:
        residents = Residents("cpu", full, 10**9)

        async def use() -> None:
            async with residents.hold(tiny.model, [tiny.topk]):
                pass

        await asyncio.gather(*(use() for _ in range(10)))

    run(test)
    assert len(loads) == 1


def test_loading_is_seen_and_holds_nobody_up(tiny: Tiny, saes: list[SaeRef], monkeypatch: pytest.MonkeyPatch) -> None:
    load = residents_module.load_sae

    def slow(path: Path, **kept: Any) -> Any:
        if path.name == "b":
            time.sleep(0.5)
        return load(path, **kept)

    monkeypatch.setattr(residents_module, "load_sae", slow)

    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        async with residents.hold(tiny.model, [saes[0]]):
            pass

        async def use(sae: SaeRef) -> float:
            async with residents.hold(tiny.model, [sae]):
                return time.monotonic()

        slow_one = asyncio.create_task(use(saes[1]))
        await asyncio.sleep(0.1)
        assert residents.list()[1] == ["tiny/b"]
        began = time.monotonic()
        assert await use(saes[0]) - began < 0.2
        await slow_one

    run(test)


def test_what_cannot_be_loaded_is_forgotten_and_may_be_tried_again(tiny: Tiny, saes: list[SaeRef]) -> None:
    config = Path(saes[0].path) / "cfg.json"
    good = config.read_text()

    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        config.write_text("{")
        with pytest.raises(ValueError, match="Expecting"):
            async with residents.hold(tiny.model, [saes[0]]):
                pass
        config.write_text(good)
        async with residents.hold(tiny.model, [saes[0]]):
            assert "tiny/a" in ids(residents)

    run(test)


def test_a_directory_that_is_gone_is_named(tiny: Tiny, tmp_path: Path) -> None:
    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        with pytest.raises(NotFound, match="gone"):
            async with residents.hold(ModelRef(id="gone", path=str(tmp_path / "nowhere")), []):
                pass

    run(test)


def test_a_model_of_which_only_a_description_is_here_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text("[]")

    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        with pytest.raises(NotFound, match=r"sae-atlas model add .* --id bundled"):
            async with residents.hold(ModelRef(id="bundled", path=str(tmp_path)), []):
                pass

    run(test)


def test_loading_may_be_begun_and_looked_at_without_waiting(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = threading.Event()
    slow = Residents._load_model

    def waits(self: Residents, path: Path, loaded: Loaded) -> Any:
        loaded(0.25)
        begin.wait(20)
        return slow(self, path, loaded)

    monkeypatch.setattr(Residents, "_load_model", waits)

    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        first = await residents.load(tiny.model, [tiny.topk], 0.05)
        assert [(item.id, item.bytes > 0) for item in first] == [("tiny", True), ("tiny/1-topk", True)]
        assert first[0].loaded == first[0].bytes // 4
        assert first[1].loaded == 0
        again = await residents.load(tiny.model, [tiny.topk], 0.05)
        assert again[0].seconds >= first[0].seconds
        begin.set()
        assert await residents.load(tiny.model, [tiny.topk], 20) == []
        assert ids(residents) == ["tiny", "tiny/1-topk"]

    run(test)


def test_a_loading_that_failed_unseen_is_told_once_to_who_asks_next(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cfg.json").write_text('{"architecture": "magic"}')
    bad = SaeRef(id="tiny/bad", path=str(tmp_path / "bad"))

    async def test() -> None:
        residents = Residents("cpu", full, 10**9)
        assert [item.id for item in await residents.load(tiny.model, [bad], 0)] == ["tiny", "tiny/bad"]
        await asyncio.sleep(0.1)  # nobody waits for it
        with pytest.raises(BadFile, match="'magic' is not known"):
            await until_loaded(residents, tiny.model, bad)

    run(test)


def test_the_share_that_is_loaded_grows_to_the_whole(tiny: Tiny) -> None:
    model: list[float] = []
    sae: list[float] = []
    LanguageModel.load(Path(tiny.model.path), loaded=model.append)
    residents_module.load_sae(Path(tiny.topk.path), loaded=sae.append)
    for shares in (model, sae):
        assert len(shares) > 3
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)


def test_a_model_is_counted_and_loaded_in_the_precision_chosen_for_its_size(tiny: Tiny, model_bytes: int) -> None:
    async def test() -> None:
        residents = Residents("cpu", lambda n: torch.bfloat16 if 4 * n == model_bytes else torch.float32, model_bytes)
        async with residents.hold(tiny.model, [tiny.topk]) as held:
            assert held.language.dtype == torch.bfloat16
            assert held.saes[tiny.topk.path].W_enc.dtype == torch.float32
        assert residents.used_bytes == model_bytes // 2 + SAE_BYTES

    run(test)


async def until_loaded(residents: Residents, model: ModelRef, sae: SaeRef) -> None:
    while await residents.load(model, [sae], 0.05):
        pass
