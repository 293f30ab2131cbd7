"""Owners, priorities and logs of jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("owner", sa.String(200), nullable=False, server_default=""))
        jobs.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("run_next", sa.Boolean(), nullable=False, server_default=sa.false()))
        jobs.create_index("ix_jobs_owner", ["owner"])
    op.create_table(
        "job_lines",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("level", sa.String(20), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_lines_job_id_jobs"),
        sa.PrimaryKeyConstraint("id", name="pk_job_lines"),
    )
    op.create_index("ix_job_lines_job", "job_lines", ["job_id", "id"])


def downgrade() -> None:
    op.drop_table("job_lines")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_owner")
        jobs.drop_column("run_next")
        jobs.drop_column("priority")
        jobs.drop_column("owner")
