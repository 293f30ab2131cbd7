"""The job kind `sweep`: many strengths in parts; a part that was interrupted is made again and comes out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app import db
from app.settings import Settings
from app.tables import Job, Model, Source
from tests.tiny import D_IN, D_SAE, HOOK, K, Tiny
from workers.language_model import LanguageModel
from workers.trainer.kinds import JobContext
from workers.trainer.sweep import Sweep

STRENGTHS = [float(n) for n in range(11)]


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> Settings:
    made = Settings(data_dir=tmp_path / "data", device="cpu", threads=1)
    made.data_dir.mkdir()
    for name in ("models", "saes"):
        (made.data_dir / name).symlink_to(tiny.data_dir / name)
    engine = db.connect(made)
    db.migrate(engine)
    card = LanguageModel.load(Path(tiny.model.path)).card
    shared: dict[str, Any] = {"set_name": "topk", "sae_hash": "topk", "architecture": "topk", "config": {"k": K}}
    shared |= {"layer": 1, "hook_name": HOOK, "d_in": D_IN, "d_sae": D_SAE, "metrics": {}, "origin": {}}
    with db.sessions(engine).begin() as session:
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        session.flush()
        session.add(Source(model_id="tiny", name="1-topk", **shared))
    return made


def context(settings: Settings, number: int) -> JobContext:
    feature = {"modelId": "tiny", "source": "1-topk", "index": "3", "strength": 1.0}
    spec = {"modelId": "tiny", "prompt": "the cat sat on", "features": [feature], "temperature": 1.0, "n_tokens": 5}
    spec["axes"] = [{"feature": 0, "strengths": STRENGTHS}]
    sessions = db.sessions(db.connect(settings))
    with sessions.begin() as session:
        session.merge(Job(id=number, kind="sweep", title="", spec=spec, result={}, workflow_id="", state="running"))
    directory = settings.job_dir(number)
    directory.mkdir(parents=True, exist_ok=True)
    return JobContext(settings, sessions, number, spec, directory)


def test_an_interrupted_sweep_comes_out_as_one_that_was_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, torn, kind = context(settings, 1), context(settings, 2), Sweep()
    steps = kind.plan(whole)
    assert len(steps) == 2
    for step in steps:
        kind.run(whole, step)
    expected = kind.finish(whole)
    assert [p["strengths"] for p in expected["points"]] == [[], *([s] for s in STRENGTHS)]
    kind.run(torn, steps[0])
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", _killed)  # the process dies with the file half there
        with pytest.raises(KeyboardInterrupt):
            kind.run(torn, steps[1])
    again = context(settings, 2)  # another process: nothing but the files is left
    for step in steps[1:]:
        kind.run(again, step)
    found = kind.finish(again)
    assert found["points"] == expected["points"]
    assert kind.finish(again) == found  # killed after finishing


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
