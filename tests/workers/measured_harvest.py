"""A harvest in processes of its own: `prepare DATA_DIR N_TOKENS` makes the corpus and the job, `run DATA_DIR` does it.

`run` prints the tokens read and the memory taken. That is anonymous memory, sampled every few milliseconds: pages of
mapped files belong to the kernel, which takes them back when it needs them. The bounds of a chunk are small, so that
half a million tokens are many chunks.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np

from app import corpora, db, documents, harvests, jobs, spill, weights
from app.settings import Settings
from app.specs import HarvestSpec
from app.tables import JobState, Model
from workers.language_model import LanguageModel
from workers.trainer import assemble, harvest, negatives
from workers.trainer.kinds import JobContext

CONTEXT = 65


def main() -> None:
    if sys.argv[1] == "prepare":
        harvest.readings_of(prepared(Path(sys.argv[2]), int(sys.argv[3])))  # tokenises
    else:
        spill.RECORDS_PER_CHUNK = 50_000
        assemble._MAX_CORRELATED_RECORDS = 100_000
        negatives.SEARCHED = 500
        harvest.CONTEXTS_PER_SHARD = 128
        print(*run(Path(sys.argv[2])))


def run(data_dir: Path) -> tuple[int, int]:
    """Do the harvest and return the tokens read and the bytes taken beyond what loading takes."""
    settings = Settings(data_dir=data_dir, device="cpu")
    make = db.sessions(db.connect(settings))
    with make() as session:
        job = jobs.recent(session)[0]
    context = JobContext(settings, make, job.id, job.spec, settings.job_dir(job.id))
    kind, most, done = harvest.Harvest(), [0], threading.Event()
    steps = kind.plan(context)
    before = anonymous()
    threading.Thread(target=watch, args=(most, done), daemon=True).start()
    for step in steps:
        kind.run(context, step)
    result = kind.finish(context)
    done.set()
    return result["n_tokens"], most[0] - before


def watch(most: list[int], done: threading.Event) -> None:
    while not done.is_set():
        most[0] = max(most[0], anonymous())
        time.sleep(0.003)


def anonymous() -> int:
    """Bytes of memory that is no file's."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def prepared(data_dir: Path, n_tokens: int) -> JobContext:
    """A catalog with the tiny model that lies there, its TopK SAE and a corpus of random words, and a harvest in it."""
    settings = Settings(data_dir=data_dir, device="cpu")
    engine = db.connect(settings)
    db.migrate(engine)
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, size=n_tokens * 2).astype(np.uint8)
    letters[::5] = ord(" ")
    (data_dir / "c.txt").write_bytes(letters.tobytes())
    spec = HarvestSpec(
        model="tiny", source="1-x", corpus="c", n_tokens=n_tokens, context_size=CONTEXT, n_effects=0, draw_map=False
    )  # pyright: ignore[reportCallIssue]
    make = db.sessions(engine)
    with make.begin() as session:
        card = LanguageModel.load(data_dir / "models" / "tiny").card
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        corpora.add_corpus(session, settings, documents.read(data_dir / "c.txt"), "c")
        facts = weights.check_sae(data_dir / "saes" / "topk", card.d_model, settings)
        harvests.catalogue_sae(session, settings, facts, model_id="tiny", set_name="x", metrics={}, origin={})
        job_id = jobs.submit(session, settings, "harvest", "h", spec.model_dump(mode="json")).id
        jobs.get(session, job_id).state = JobState.DONE  # no trainer may take it
    settings.job_dir(job_id).mkdir(parents=True)
    return JobContext(settings, make, job_id, spec.model_dump(mode="json"), settings.job_dir(job_id))


if __name__ == "__main__":
    main()
