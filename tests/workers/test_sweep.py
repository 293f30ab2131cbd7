"""The job kind `sweep`: many strengths in parts; a part that was interrupted is made again and comes out the same."""

from __future__ import annotations

import pytest

from app import db
from app.settings import Settings
from app.tables import Job
from workers.trainer.kinds import JobContext
from workers.trainer.sweep import Sweep

STRENGTHS = [float(n) for n in range(11)]


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
