"""Owner, visibility and the secret of a public link: of SAEs, jobs, steering runs and vectors."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_TABLES = ("sources", "jobs", "steering_runs", "steering_vectors")


def upgrade() -> None:
    for name in _TABLES:
        with op.batch_alter_table(name) as table:
            if name != "jobs":
                table.add_column(sa.Column("owner", sa.String(200), nullable=False, server_default=""))
            table.add_column(sa.Column("visibility", sa.String(10), nullable=False, server_default="team"))
            table.add_column(sa.Column("link", sa.String(32), nullable=False, server_default=""))


def downgrade() -> None:
    for name in _TABLES:
        with op.batch_alter_table(name) as table:
            table.drop_column("link")
            table.drop_column("visibility")
            if name != "jobs":
                table.drop_column("owner")
