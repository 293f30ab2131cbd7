"""The words that tables are filtered by, apart from the features' rows; on SQLite both lie in the order of their keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "feature_words",
        sa.Column("source_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("latent", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["source_id"], ["sources.id"], name=op.f("fk_feature_words_source_id_sources")),
        sa.PrimaryKeyConstraint("source_id", "kind", "latent", name=op.f("pk_feature_words")),
        sqlite_with_rowid=False,
    )
    for kind in ("tokens", "logits"):
        op.execute(
            "INSERT INTO feature_words (source_id, kind, latent, text) "
            f"SELECT source_id, '{kind}', latent, {kind} FROM features "
            f"WHERE {kind} IS NOT NULL ORDER BY source_id, latent"
        )
    # By a new table on SQLite: columns dropped in place would leave its pages nearly empty, and as many to read.
    with op.batch_alter_table("features", table_kwargs={"sqlite_with_rowid": False}) as features:
        features.drop_column("tokens")
        features.drop_column("logits")


def downgrade() -> None:
    with op.batch_alter_table("features", recreate="auto") as features:
        features.add_column(sa.Column("tokens", sa.Text(), nullable=True))
        features.add_column(sa.Column("logits", sa.Text(), nullable=True))
    for kind in ("tokens", "logits"):
        op.execute(
            f"UPDATE features SET {kind} = (SELECT w.text FROM feature_words w WHERE w.source_id = features.source_id "
            f"AND w.kind = '{kind}' AND w.latent = features.latent)"
        )
    op.drop_table("feature_words")
