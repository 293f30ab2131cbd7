"""Saved runs of the prompt lab."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import app.tables

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('prompt_runs',
    sa.Column('id', sa.String(length=32), nullable=False),
    sa.Column('model_id', sa.String(length=200), nullable=False),
    sa.Column('request', sa.JSON(), nullable=False),
    sa.Column('hashes', sa.JSON(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('fk_prompt_runs_model_id_models')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_prompt_runs'))
    )


def downgrade() -> None:
    op.drop_table('prompt_runs')
