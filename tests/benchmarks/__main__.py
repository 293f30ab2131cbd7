"""`make bench`: run every benchmark of this directory, print its figures and write them into the README.

A benchmark is a module with a `main()` that returns its figures. Arguments choose some of them by name.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def main() -> None:
    results: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in sys.argv[1:] or names():
        module = importlib.import_module(f"tests.benchmarks.{name}")
        figures = module.main()
        show(name, figures)
        results[name] = ((module.__doc__ or name).strip().splitlines()[0], figures)
    if not sys.argv[1:]:
        write(results)


def names() -> list[str]:
    """The modules of this directory that have a `main`."""
    files = sorted(p for p in HERE.glob("*.py") if not p.name.startswith("_"))
    return [p.stem for p in files if "\ndef main(" in p.read_text()]


def show(name: str, figures: dict[str, Any]) -> None:
    print(name)
    for what, value in figures.items():
        print(f"  {what:<40} {value}")


def write(results: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Replace what stands between the README's markers."""
    text = README.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    lines = [f"Measured by `make bench` on {datetime.now(UTC):%Y-%m-%d}, {machine()}.", ""]
    lines += ["| benchmark | figures |", "| --- | --- |"]
    for about, figures in results.values():
        lines.append(f"| {about} | {'; '.join(f'{what}: {value}' for what, value in figures.items())} |")
    README.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}")


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {device}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
