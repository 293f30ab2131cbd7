"""What lies where, and who imports whom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    *("pyproject.toml", "README.md", "docker-compose.yml", "Makefile", "Dockerfile", "LICENSE", "CHANGELOG.md"),
    *("CONTRIBUTING.md", ".ci", ".gitignore", "app", "workers", "templates", "static", "migrations", "tests"),
    *(".dockerignore", "docs"),
}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_the_top_level_holds_what_was_agreed_and_nothing_else() -> None:
    assert {path.partition("/")[0] for path in tracked()} <= ALLOWED


def test_no_module_is_a_bag_of_things() -> None:
    bags = {"utils", "helpers", "common", "manager", "misc", "shared"}
    assert [path for path in tracked() if Path(path).stem in bags] == []


@pytest.mark.parametrize("module", ["app.main", "app.cli", "app.supervisor", "app.doctor", "app.weights"])
def test_the_web_side_starts_without_torch_and_without_the_queue(module: str) -> None:
    code = f"import {module}, sys; print({{'torch', 'transformers', 'workers', 'dbos'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_every_module_says_what_it_promises() -> None:
    modules = [ROOT / p for p in tracked() if p.endswith(".py") and not p.endswith("__init__.py")]
    silent = [str(m.relative_to(ROOT)) for m in modules if m.exists() and not m.read_text().lstrip().startswith('"""')]
    assert silent == []


def test_the_readme_names_every_module_that_is_not_a_page_or_a_route() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z_]+", readme[readme.index("app/    settings") :].split("```")[0]))
    folders = [ROOT / "app", *(ROOT / "workers" / name for name in ("", "gpu", "sae", "trainer"))]
    modules = {path.stem for folder in folders for path in folder.glob("[a-z]*.py")}
    assert modules - named == set()
