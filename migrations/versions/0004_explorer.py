"""What the catalog's pages search and filter by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Filled by app.wording, which reads the evidence and needs the data directory.
    op.add_column("features", sa.Column("tokens", sa.Text(), nullable=True))
    op.add_column("features", sa.Column("logits", sa.Text(), nullable=True))
    op.create_table(
        "embeddings",
        sa.Column("text_hash", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("text_hash", "model", name=op.f("pk_embeddings")),
    )


def downgrade() -> None:
    op.drop_table("embeddings")
    op.drop_column("features", "logits")
    op.drop_column("features", "tokens")
