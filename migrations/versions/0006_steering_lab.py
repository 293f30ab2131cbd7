"""Presets and vectors of the steering lab."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "steering_presets",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("model_id", sa.String(200), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_steering_presets_model_id_models"),
        sa.PrimaryKeyConstraint("id", name="pk_steering_presets"),
    )
    op.create_index("ix_steering_presets_model_id", "steering_presets", ["model_id"])
    op.create_table(
        "steering_vectors",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(200), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("hook_name", sa.String(200), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("default_strength", sa.Float(), nullable=False),
        sa.Column("values", sa.LargeBinary(), nullable=False),
        sa.Column("about", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_steering_vectors_model_id_models"),
        sa.PrimaryKeyConstraint("id", name="pk_steering_vectors"),
    )
    op.create_index("ix_steering_vectors_model_id", "steering_vectors", ["model_id"])


def downgrade() -> None:
    op.drop_table("steering_vectors")
    op.drop_table("steering_presets")
