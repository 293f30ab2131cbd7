"""Feature pages over HTTP: median and 95th percentile of random features, at the server and for who asks."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

from tests.benchmarks.servers import demo, seconds

N_PAGES = 300


def main() -> dict[str, Any]:
    at_server: list[float] = []
    with demo() as servers:
        choose = random.Random(1)

        def page() -> None:
            index = choose.randrange(servers.d_sae)
            answer = servers.http.get(f"/{servers.model}/{servers.source}/{index}")
            assert answer.status_code == 200
            at_server.append(float(answer.headers["server-timing"].partition("dur=")[2]))

        for _ in range(20):
            page()
        at_server.clear()
        at_client = [seconds(page) * 1000 for _ in range(N_PAGES)]
    return {
        "at the server, median, ms": round(median(at_server), 1),
        "at the server, 95 %, ms": round(sorted(at_server)[int(N_PAGES * 0.95)], 1),
        "over HTTP, median, ms": round(median(at_client), 1),
        "over HTTP, 95 %, ms": round(sorted(at_client)[int(N_PAGES * 0.95)], 1),
        "wanted": "median at the server up to 10",
    }


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("page", main())
