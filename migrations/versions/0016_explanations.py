"""Votes on explanations, and those that were taken back."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("explanations") as table:
        table.add_column(sa.Column("n_votes", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "explanation_votes",
        sa.Column("explanation_id", sa.Integer(), nullable=False),
        sa.Column("who", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["explanation_id"], ["explanations.id"], name="fk_explanation_votes_explanation_id_explanations"
        ),
        sa.PrimaryKeyConstraint("explanation_id", "who", name="pk_explanation_votes"),
    )
    op.create_table(
        "retired_explanations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source_id", sa.Integer(), nullable=False),
        sa.Column("latent", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("method", sa.String(200), nullable=False),
        sa.Column("author", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("retired_by", sa.String(200), nullable=False),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["source_id"], ["sources.id"], name="fk_retired_explanations_source_id_sources"),
        sa.PrimaryKeyConstraint("id", name="pk_retired_explanations"),
    )
    op.create_index("ix_retired_explanations_feature", "retired_explanations", ["source_id", "latent"])


def downgrade() -> None:
    op.drop_table("retired_explanations")
    op.drop_table("explanation_votes")
    with op.batch_alter_table("explanations") as table:
        table.drop_column("n_votes")
