"""Feature pages over HTTP: median and 95th percentile of random features."""

from __future__ import annotations

import random
from typing import Any

from tests.benchmarks.servers import demo, seconds

N_PAGES = 300


def main() -> dict[str, Any]:
    with demo() as servers:
        choose = random.Random(1)

        def page() -> None:
            index = choose.randrange(servers.d_sae)
            assert servers.http.get(f"/{servers.model}/{servers.source}/{index}").status_code == 200

        for _ in range(20):
            page()
        times = sorted(seconds(page) * 1000 for _ in range(N_PAGES))
    return {
        "median, ms": round(times[N_PAGES // 2], 1),
        "95 %, ms": round(times[int(N_PAGES * 0.95)], 1),
        "wanted": "median under 10",
    }


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("page", main())
