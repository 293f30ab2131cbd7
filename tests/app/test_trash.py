"""What is deleted is hidden, comes back bit by bit as it was within 30 days, and is gone after them; both databases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app import cards, catalog, corpora, explanations, lists, search, steering_vectors, steerings, surroundings, trash
from app.cli import app as command
from app.errors import Conflict, NotFound
from app.people import LOCAL, Actor, Role
from app.settings import Settings
from app.tables import Corpus, Evidence, Explanation, ExplanationVote, Source, Table, Trash
from tests.app.test_visibility import Lab, lab

__all__ = ["lab"]
ADA, BOB = Actor("ada", Role.EDITOR, 1), Actor("bob", Role.EDITOR, 2)


def state(session: Session, settings: Settings) -> dict[str, str]:
    """Digest of every table's rows and of every file."""
    found: dict[str, str] = {}
    for table in Table.metadata.sorted_tables:
        rows = sorted(repr(tuple(row)) for row in session.execute(text(f"SELECT * FROM {table.name}")))
        found[table.name] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    for path in sorted(settings.data_dir.rglob("*")):
        inside = path.relative_to(settings.data_dir)
        if path.is_file() and inside.suffix not in (".sqlite", ".sqlite-wal", ".sqlite-shm", ".lock"):
            found[str(inside)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def sae(session: Session) -> Source:
    card = catalog.source_card(session, "tiny", "1-demo")
    cards.edit(session, LOCAL, "tiny", "1-demo", "a, b", "*of it*", "1-other")
    cards.star(session, ADA, card, True)
    made = explanations.write(session, ADA, "tiny", "1-demo", 3, "said by ada")
    explanations.vote(session, BOB, made.id, True)
    lists.new(session, ADA, "mine", features=[lists.Key("tiny", "1-demo", 3, "a note")])
    return session.get_one(Source, card.id)


def corpus(session: Session) -> Corpus:
    made = Corpus(name="spare", hash="c9", n_documents=0, n_chars=0, about="")
    session.add(made)
    session.flush()
    return made


def feature_list(session: Session) -> trash.Item:
    return lists.new(
        session, ADA, "mine", features=[lists.Key("tiny", "1-demo", 3, "n"), lists.Key("tiny", "1-demo", 1)]
    )


def run(session: Session) -> trash.Item:
    return steerings.save(session, "tiny", {"prompt": "x", "features": []}, {"STEERED": "y"})


def vector(session: Session) -> trash.Item:
    return steering_vectors.add(session, "tiny", "blocks.1.hook_resid_post", "v", [1.0, 2.0, 3.0], 5.0, "made")


def test_everything_that_is_deleted_is_hidden_and_comes_back_as_it_was(session: Session, settings: Settings) -> None:
    makers: tuple[Callable[[Session], trash.Item], ...] = (sae, corpus, feature_list, run, vector)
    for make in makers:
        item = make(session)
        session.commit()
        before, where, key, table = state(session, settings), trash.path(item), item.id, type(item)
        entry_id = trash.put(session, ADA, item).id
        session.commit()
        session.expunge_all()
        assert session.get(table, key) is None, table
        assert session.scalars(select(table.id).where(table.id == key)).all() == []
        assert [e.name for e in trash.entries(session, ADA)], table
        back = trash.restore(session, ADA, entry_id)
        session.commit()
        assert trash.path(back) == where
        assert state(session, settings) == before, table


def test_a_deleted_sae_is_nowhere_and_its_name_is_free(session: Session, settings: Settings) -> None:
    entry = trash.put(session, LOCAL, sae(session))
    session.commit()
    with pytest.raises(catalog.NotInCatalog):
        catalog.source_card(session, "tiny", "1-demo")
    assert catalog.default_source(session, "tiny", 1).name == "1-other"
    assert search.find(session, None, "said by ada").total == 0
    other = catalog.source_card(session, "tiny", "2-plain")
    assert "1-demo" not in surroundings.around(session, other, 0, []).sources
    assert [item.card for item in lists.described(session, [lists.Key("tiny", "1-demo", 3)])] == [None]
    session.add(
        Source(
            **{"model_id": "tiny", "name": "1-demo", "layer": 1, "set_name": "demo", "sae_hash": "zz"},
            **{"architecture": "x", "hook_name": "h", "d_in": 3, "d_sae": 4, "config": {}, "metrics": {}, "origin": {}},
        )
    )
    session.commit()
    with pytest.raises(Conflict, match="Another is called tiny/1-demo by now"):
        trash.restore(session, LOCAL, entry.id)
    session.rollback()
    trash.put(session, LOCAL, session.scalars(select(Source).where(Source.name == "1-demo")).one())
    trash.restore(session, LOCAL, entry.id)
    session.commit()
    assert catalog.source_card(session, "tiny", "1-demo").d_sae == 40
    assert catalog.default_source(session, "tiny", 1).name == "1-demo"


def test_after_thirty_days_it_is_gone_with_its_rows_and_files(session: Session, settings: Settings) -> None:
    item = sae(session)
    directory, source_id = settings.sae_dir(item.sae_hash), item.id
    n_evidence = session.query(Evidence).count()
    entry = trash.put(session, LOCAL, item)
    entry.deleted_at -= timedelta(days=29)
    session.commit()
    assert trash.purge(session, settings) == 0
    session.get_one(Trash, entry.id).deleted_at -= timedelta(days=2)
    session.commit()
    assert trash.purge(session, settings) == 1
    assert n_evidence > 0
    assert session.query(Evidence).count() == 0
    assert session.query(Explanation).where(Explanation.source_id == source_id).count() == 0
    assert not directory.exists()
    with pytest.raises(NotFound):
        trash.restore(session, LOCAL, entry.id)


def test_a_corpus_that_something_in_the_trash_needs_stays(session: Session, settings: Settings) -> None:
    trash.put(session, LOCAL, sae(session))
    session.commit()
    with pytest.raises(Conflict, match="1 in the trash"):
        trash.put_corpus(session, LOCAL, "made")


def test_text_that_was_added_again_survives_the_older_ones_end(session: Session, settings: Settings) -> None:
    first = corpus(session)
    (settings.corpus_dir("c9")).mkdir(parents=True)
    trash.put(session, LOCAL, first)
    corpus(session)
    session.commit()
    assert trash.purge(session, settings, timedelta(0)) == 1
    assert settings.corpus_dir("c9").is_dir()
    assert corpora.corpus_named(session, "spare").hash == "c9"


def test_only_its_owner_who_deleted_it_and_admins_restore(session: Session) -> None:
    item = sae(session)
    item.owner = "ada"
    entry = trash.put(session, ADA, item)
    session.commit()
    assert trash.entries(session, BOB) == []
    with pytest.raises(NotFound, match="another's"):
        trash.restore(session, BOB, entry.id)
    assert len(trash.entries(session, Actor("root", Role.ADMIN, 3))) == 1
    trash.restore(session, Actor("root", Role.ADMIN, 3), entry.id)


def test_an_explanation_comes_back_with_its_votes(session: Session, settings: Settings) -> None:
    made = explanations.write(session, ADA, "tiny", "1-demo", 3, "said by ada")
    explanations.vote(session, BOB, made.id, True)
    session.commit()
    before = state(session, settings)
    kept = explanations.retire(session, ADA, made.id)
    session.commit()
    assert session.query(ExplanationVote).count() == 0
    assert [e.text for e in explanations.retired(session, ADA, 30)] == ["said by ada"]
    assert explanations.retired(session, BOB, 30) == []
    explanations.restore(session, ADA, kept.id)
    session.commit()
    assert state(session, settings) == before


def test_the_pages_delete_show_and_restore(client: TestClient) -> None:
    before = client.get("/api/feature/tiny/1-demo/3").json()
    assert client.post("/tiny/1-demo/remove").status_code == 200
    assert client.get("/tiny/1-demo").status_code == 404
    page = client.get("/trash").text
    assert "tiny/1-demo" in page
    assert "30" in page
    assert client.post("/trash/1/restore").status_code == 200
    assert client.get("/api/feature/tiny/1-demo/3").json() == before
    assert client.post("/trash/1/restore").status_code == 404
    for wrong in ("0", "99999999", "x", "-1"):
        assert client.post(f"/trash/{wrong}/restore").status_code == 404


def test_a_team_sees_its_own_trash(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    for path in (
        "/tiny/1-zebra/remove",
        f"/vectors/{lab.ids['vector']}/delete",
        f"/tiny/steer/{lab.ids['run']}/delete",
    ):
        assert ada.post(path).status_code == 303, path
    assert "tiny/1-zebra" in ada.get("/trash").text
    assert "zebra" not in bob.get("/trash").text
    refused = bob.post("/trash/1/restore")
    assert refused.status_code == 404
    assert "zebra" not in refused.text
    assert ada.post("/trash/1/restore").headers["location"] == "/tiny/1-zebra"
    assert bob.get("/tiny/1-zebra").status_code == 404, "it is as private as it was"


def test_the_command_lists_and_restores(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_ATLAS_DATA_DIR", str(settings.data_dir))
    run = CliRunner()
    said = run.invoke(command, ["sae", "remove", "tiny/1-demo", "--yes"])
    assert "sae-atlas trash restore 1" in said.output, said.output
    assert "tiny/1-demo" in run.invoke(command, ["trash", "list"]).output
    assert "Restored /tiny/1-demo" in run.invoke(command, ["trash", "restore", "1"]).output
    assert client.get("/tiny/1-demo").status_code == 200
    assert Path(settings.sae_dir("aa")).is_dir()
