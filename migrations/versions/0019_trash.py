"""What was deleted lies in the trash for a while; explanations that were taken back keep their id and votes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0024"
branch_labels = None
depends_on = None

_TABLES = ("sources", "corpora", "feature_lists", "steering_runs", "steering_vectors")


def upgrade() -> None:
    op.create_table(
        "trash",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("deleted_by", sa.String(200), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_trash"),
    )
    for name in _TABLES:
        # Not by a batch: on SQLite that makes the table anew and drops the old one, to which a catalog's rows point.
        reference = f"CONSTRAINT fk_{name}_trash_id_trash REFERENCES trash (id)"
        op.execute(f"ALTER TABLE {name} ADD COLUMN trash_id INTEGER {reference}")
    with op.batch_alter_table("retired_explanations") as table:
        table.add_column(sa.Column("was_id", sa.Integer(), nullable=True))
        table.add_column(sa.Column("votes", sa.JSON(), nullable=False, server_default="[]"))


def downgrade() -> None:
    with op.batch_alter_table("retired_explanations") as table:
        table.drop_column("votes")
        table.drop_column("was_id")
    for name in _TABLES:
        with op.batch_alter_table(name) as table:
            table.drop_column("trash_id")
    op.drop_table("trash")
