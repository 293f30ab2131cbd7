"""The evidence engine's tables and columns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import app.tables

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table('harvests') as batch:
        batch.add_column(sa.Column('state', sa.String(length=20), nullable=False, server_default='complete'))
        batch.add_column(sa.Column('job_id', sa.Integer(), nullable=True))
        batch.add_column(sa.Column('activations', sa.String(length=200), nullable=False, server_default=''))
    # A plain ADD COLUMN: rebuilding a table of gigabytes would take minutes.
    op.add_column('evidence', sa.Column('effects', sa.LargeBinary(), nullable=True))
    op.create_table('feature_maps',
    sa.Column('source_id', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('sae_hash', sa.String(length=64), nullable=False),
    sa.Column('coordinates', sa.LargeBinary(), nullable=False),
    sa.Column('cluster', sa.LargeBinary(), nullable=False),
    sa.Column('clusters', sa.JSON(), nullable=False),
    sa.Column('about', sa.JSON(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['source_id'], ['sources.id'], name=op.f('fk_feature_maps_source_id_sources')),
    sa.PrimaryKeyConstraint('source_id', name=op.f('pk_feature_maps'))
    )
    op.create_table('source_matches',
    sa.Column('source_id', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('other_id', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('hashes', sa.String(length=200), nullable=False),
    sa.Column('n', sa.Integer(), nullable=False),
    sa.Column('indices', sa.LargeBinary(), nullable=False),
    sa.Column('cosines', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['source_id'], ['sources.id'], name=op.f('fk_source_matches_source_id_sources')),
    sa.ForeignKeyConstraint(['other_id'], ['sources.id'], name=op.f('fk_source_matches_other_id_sources')),
    sa.PrimaryKeyConstraint('source_id', 'other_id', name=op.f('pk_source_matches'))
    )
    op.add_column('jobs', sa.Column('pause_requested', sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table('job_shares',
    sa.Column('job_id', sa.Integer(), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('executor', sa.String(length=200), nullable=False),
    sa.Column('done', sa.Boolean(), nullable=False),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_job_shares_job_id_jobs')),
    sa.PrimaryKeyConstraint('job_id', 'name', name=op.f('pk_job_shares'))
    )


def downgrade() -> None:
    op.drop_table('job_shares')
    with op.batch_alter_table('jobs') as batch:
        batch.drop_column('pause_requested')
    op.drop_table('source_matches')
    op.drop_table('feature_maps')
    with op.batch_alter_table('evidence') as batch:
        batch.drop_column('effects')
    with op.batch_alter_table('harvests') as batch:
        batch.drop_column('activations')
        batch.drop_column('job_id')
        batch.drop_column('state')
