"""Settings come from the environment, and the README documents every one as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings

README = Path(__file__).resolve().parents[2] / "README.md"


def documented() -> dict[str, tuple[str, str]]:
    """Default and description of each setting, as the README's table has them."""
    rows = re.findall(r"^\| `SAE_ATLAS_(\w+)` \| (.*?) \| (.*?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): (default.strip("`"), description) for name, default, description in rows}


def shown(name: str) -> str:
    if name == "data_dir":
        return "user data folder"
    default = Settings.model_fields[name].default
    return "empty" if default == "" else str(default)


def test_the_readme_lists_every_setting_with_its_default_and_its_description() -> None:
    expected = {name: (shown(name), field.description) for name, field in Settings.model_fields.items()}
    assert documented() == expected


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAE_ATLAS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SAE_ATLAS_PORT", "4000")
    monkeypatch.setenv("SAE_ATLAS_LOG_FORMAT", "json")
    settings = Settings()
    assert (settings.data_dir, settings.port, settings.log_format) == (tmp_path, 4000, "json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70_000), ("threads", -1), ("device", "tpu"), ("beat_seconds", 0), ("log_level", "LOUD")],
)
def test_a_value_that_makes_no_sense_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: value})


def test_settings_cannot_be_changed_after_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings(data_dir=tmp_path).port = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_the_queue_follows_a_postgres_catalog_and_otherwise_has_a_file_of_its_own(tmp_path: Path) -> None:
    shared = "postgresql+psycopg://h/db"
    assert Settings(data_dir=tmp_path).queue_url == f"sqlite:///{tmp_path}/jobs.sqlite"
    assert Settings(data_dir=tmp_path, database_url=shared).queue_url == shared
    assert Settings(data_dir=tmp_path, database_url="sqlite:///x").queue_url == f"sqlite:///{tmp_path}/jobs.sqlite"
    assert Settings(database_url=shared, jobs_database_url="sqlite:///y").queue_url == "sqlite:///y"


def test_a_socket_path_beyond_what_unix_allows_moves_to_the_temporary_folder(tmp_path: Path) -> None:
    deep = Settings(data_dir=tmp_path / ("d" * 120))
    other = Settings(data_dir=tmp_path / ("e" * 120))
    assert len(str(deep.socket_path)) < 107
    assert deep.socket_path != other.socket_path
    assert Settings(data_dir=Path("/srv/atlas")).socket_path == Path("/srv/atlas/run/worker.sock")
    assert Settings(worker_socket="/run/w.sock").socket_path == Path("/run/w.sock")
