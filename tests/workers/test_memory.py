"""How much memory the evidence engine takes, measured in real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny import Tiny

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20


def measured(tiny: Tiny, data_dir: Path, n_tokens: int) -> tuple[int, int]:
    """Tokens read and bytes taken by a harvest in a process of its own."""
    shutil.copytree(tiny.data_dir, data_dir, ignore=shutil.ignore_patterns("run"))  # a worker may have its socket there
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    for arguments in (["prepare", str(data_dir), str(n_tokens)], ["run", str(data_dir)]):
        command = [sys.executable, "-m", "tests.workers.measured_harvest", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    n_read, taken = done.stdout.split()[-2:]
    return int(n_read), int(taken)


def test_a_harvest_of_a_corpus_eight_times_as_long_takes_no_more_memory(tiny: Tiny, tmp_path: Path) -> None:
    short, little = measured(tiny, tmp_path / "short", 40_000)
    long, much = measured(tiny, tmp_path / "long", 320_000)
    print(little, much)
    assert long > 7.9 * short
    # 1.6 million activations in one chunk, or all of them correlated, are 40 MiB and more.
    assert much - little < 10 * MIB, f"{little / MIB:.0f} MiB and {much / MIB:.0f} MiB"
