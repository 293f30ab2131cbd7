"""The first tables: models, sources, corpora, harvests, features, evidence, explanations, jobs, steering runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import app.tables

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('beats',
    sa.Column('executor', sa.String(length=200), nullable=False),
    sa.Column('host', sa.String(length=200), nullable=False),
    sa.Column('pid', sa.Integer(), nullable=False),
    sa.Column('at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.Column('job_id', sa.Integer(), nullable=True),
    sa.PrimaryKeyConstraint('executor', name=op.f('pk_beats'))
    )
    op.create_table('corpora',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('hash', sa.String(length=64), nullable=False),
    sa.Column('n_documents', sa.Integer(), nullable=False),
    sa.Column('n_chars', sa.BigInteger(), nullable=False),
    sa.Column('about', sa.Text(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_corpora')),
    sa.UniqueConstraint('name', name=op.f('uq_corpora_name'))
    )
    op.create_table('jobs',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('kind', sa.String(length=200), nullable=False),
    sa.Column('title', sa.String(length=200), nullable=False),
    sa.Column('spec', sa.JSON(), nullable=False),
    sa.Column('state', sa.String(length=20), nullable=False),
    sa.Column('done', sa.Float(), nullable=False),
    sa.Column('status', sa.Text(), nullable=False),
    sa.Column('error', sa.Text(), nullable=False),
    sa.Column('result', sa.JSON(), nullable=False),
    sa.Column('cancel_requested', sa.Boolean(), nullable=False),
    sa.Column('workflow_id', sa.String(length=200), nullable=False),
    sa.Column('executor', sa.String(length=200), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.Column('started_at', app.tables.UtcDateTime(timezone=True), nullable=True),
    sa.Column('ended_at', app.tables.UtcDateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_jobs'))
    )
    op.create_index(op.f('ix_jobs_state'), 'jobs', ['state'], unique=False)
    op.create_table('models',
    sa.Column('id', sa.String(length=200), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('hash', sa.String(length=64), nullable=False),
    sa.Column('card', sa.JSON(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_models'))
    )
    op.create_table('job_metrics',
    sa.Column('job_id', sa.Integer(), nullable=False),
    sa.Column('step', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('values', sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('fk_job_metrics_job_id_jobs')),
    sa.PrimaryKeyConstraint('job_id', 'step', name=op.f('pk_job_metrics'))
    )
    op.create_table('sources',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('model_id', sa.String(length=200), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('layer', sa.Integer(), nullable=False),
    sa.Column('set_name', sa.String(length=200), nullable=False),
    sa.Column('is_default', sa.Boolean(), nullable=False),
    sa.Column('sae_hash', sa.String(length=64), nullable=False),
    sa.Column('architecture', sa.String(length=200), nullable=False),
    sa.Column('hook_name', sa.String(length=200), nullable=False),
    sa.Column('d_in', sa.Integer(), nullable=False),
    sa.Column('d_sae', sa.Integer(), nullable=False),
    sa.Column('config', sa.JSON(), nullable=False),
    sa.Column('metrics', sa.JSON(), nullable=False),
    sa.Column('origin', sa.JSON(), nullable=False),
    sa.Column('harvest_id', sa.Integer(), nullable=True),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('fk_sources_model_id_models')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_sources'))
    )
    op.create_index('uq_sources_model_id_name', 'sources', ['model_id', 'name'], unique=True)
    op.create_table('steering_runs',
    sa.Column('id', sa.String(length=32), nullable=False),
    sa.Column('model_id', sa.String(length=200), nullable=False),
    sa.Column('request', sa.JSON(), nullable=False),
    sa.Column('result', sa.JSON(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('fk_steering_runs_model_id_models')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_steering_runs'))
    )
    op.create_table('explanations',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('source_id', sa.Integer(), nullable=False),
    sa.Column('latent', sa.Integer(), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('method', sa.String(length=200), nullable=False),
    sa.Column('author', sa.String(length=200), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['source_id'], ['sources.id'], name=op.f('fk_explanations_source_id_sources')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_explanations'))
    )
    op.create_index('ix_explanations_feature', 'explanations', ['source_id', 'latent'], unique=False)
    op.create_table('features',
    sa.Column('source_id', sa.Integer(), nullable=False),
    sa.Column('latent', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('density', sa.Float(), nullable=False),
    sa.Column('max_act', sa.Float(), nullable=False),
    sa.Column('label', sa.Text(), nullable=False),
    sa.Column('top_token', sa.String(length=200), nullable=False),
    sa.Column('top_logit', sa.String(length=200), nullable=False),
    sa.ForeignKeyConstraint(['source_id'], ['sources.id'], name=op.f('fk_features_source_id_sources')),
    sa.PrimaryKeyConstraint('source_id', 'latent', name=op.f('pk_features'))
    )
    op.create_index('ix_features_density', 'features', ['source_id', 'density'], unique=False)
    op.create_index('ix_features_max_act', 'features', ['source_id', 'max_act'], unique=False)
    op.create_table('harvests',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('source_id', sa.Integer(), nullable=False),
    sa.Column('corpus_id', sa.Integer(), nullable=False),
    sa.Column('tokenizer_hash', sa.String(length=64), nullable=False),
    sa.Column('context_size', sa.Integer(), nullable=False),
    sa.Column('bos_token_id', sa.Integer(), nullable=True),
    sa.Column('n_tokens', sa.BigInteger(), nullable=False),
    sa.Column('summary', sa.JSON(), nullable=False),
    sa.Column('created_at', app.tables.UtcDateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['corpus_id'], ['corpora.id'], name=op.f('fk_harvests_corpus_id_corpora')),
    sa.ForeignKeyConstraint(['source_id'], ['sources.id'], name=op.f('fk_harvests_source_id_sources')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_harvests'))
    )
    op.create_index(op.f('ix_harvests_source_id'), 'harvests', ['source_id'], unique=False)
    with op.batch_alter_table('sources') as batch:
        batch.create_foreign_key(op.f('fk_sources_harvest_id_harvests'), 'harvests', ['harvest_id'], ['id'])
    op.create_table('evidence',
    sa.Column('harvest_id', sa.Integer(), nullable=False),
    sa.Column('latent', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('blob', sa.LargeBinary(), nullable=False),
    sa.ForeignKeyConstraint(['harvest_id'], ['harvests.id'], name=op.f('fk_evidence_harvest_id_harvests')),
    sa.PrimaryKeyConstraint('harvest_id', 'latent', name=op.f('pk_evidence'))
    )


def downgrade() -> None:
    with op.batch_alter_table('sources') as batch:
        batch.drop_constraint(op.f('fk_sources_harvest_id_harvests'), type_='foreignkey')
    op.drop_table('evidence')
    op.drop_index(op.f('ix_harvests_source_id'), table_name='harvests')
    op.drop_table('harvests')
    op.drop_index('ix_features_max_act', table_name='features')
    op.drop_index('ix_features_density', table_name='features')
    op.drop_table('features')
    op.drop_index('ix_explanations_feature', table_name='explanations')
    op.drop_table('explanations')
    op.drop_table('steering_runs')
    op.drop_index('uq_sources_model_id_name', table_name='sources')
    op.drop_table('sources')
    op.drop_table('job_metrics')
    op.drop_table('models')
    op.drop_index(op.f('ix_jobs_state'), table_name='jobs')
    op.drop_table('jobs')
    op.drop_table('corpora')
    op.drop_table('beats')
