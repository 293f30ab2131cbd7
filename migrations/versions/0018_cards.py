"""What people say of an SAE: description, tags, what replaces it, stars, and who looked at and used it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0022"
branch_labels = None
depends_on = None


def _of_source(name: str, *columns: sa.Column[object], key: tuple[str, ...]) -> None:
    op.create_table(
        name,
        sa.Column("source_id", sa.Integer(), nullable=False),
        *columns,
        sa.ForeignKeyConstraint(["source_id"], ["sources.id"], name=f"fk_{name}_source_id_sources"),
        sa.PrimaryKeyConstraint("source_id", *key, name=f"pk_{name}"),
    )


def upgrade() -> None:
    with op.batch_alter_table("sources") as table:
        table.add_column(sa.Column("description", sa.Text(), nullable=False, server_default=""))
        table.add_column(sa.Column("replaced_by", sa.String(200), nullable=False, server_default=""))
    _of_source("source_tags", sa.Column("tag", sa.String(40), nullable=False), key=("tag",))
    op.create_index("ix_source_tags_tag", "source_tags", ["tag"])
    _of_source(
        "source_stars",
        sa.Column("who", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        key=("who",),
    )
    op.create_index("ix_source_stars_who", "source_stars", ["who"])
    _of_source(
        "source_visits",
        sa.Column("who", sa.String(200), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        key=("who", "day", "kind"),
    )
    op.create_index("ix_source_visits_who", "source_visits", ["who", "day"])


def downgrade() -> None:
    for name in ("source_visits", "source_stars", "source_tags"):
        op.drop_table(name)
    with op.batch_alter_table("sources") as table:
        table.drop_column("replaced_by")
        table.drop_column("description")
