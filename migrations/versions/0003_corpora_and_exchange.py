"""Licence and origin of corpora."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("corpora", sa.Column("licence", sa.Text(), nullable=False, server_default=""))
    op.add_column("corpora", sa.Column("origin", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    with op.batch_alter_table("corpora") as table:
        table.drop_column("origin")
        table.drop_column("licence")
