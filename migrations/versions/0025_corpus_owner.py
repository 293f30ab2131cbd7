"""Who added a corpus."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE corpora ADD COLUMN owner VARCHAR(200) DEFAULT '' NOT NULL")


def downgrade() -> None:
    with op.batch_alter_table("corpora") as table:
        table.drop_column("owner")
