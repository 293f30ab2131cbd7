"""Comments, mentions and bookmarks; lists are found by the features they hold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "comments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("subject", sa.String(500), nullable=False),
        sa.Column("author", sa.String(200), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_comments"),
    )
    op.create_index("ix_comments_subject", "comments", ["subject"])
    op.create_table(
        "mentions",
        sa.Column("comment_id", sa.Integer(), nullable=False),
        sa.Column("who", sa.String(64), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["comment_id"], ["comments.id"], name="fk_mentions_comment_id_comments"),
        sa.PrimaryKeyConstraint("comment_id", "who", name="pk_mentions"),
    )
    op.create_index("ix_mentions_who", "mentions", ["who", "comment_id"])
    op.create_table(
        "bookmarks",
        sa.Column("who", sa.String(200), nullable=False),
        sa.Column("model_id", sa.String(200), nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("latent", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("who", "model_id", "source", "latent", name="pk_bookmarks"),
    )
    op.create_index("ix_listed_features_feature", "listed_features", ["model_id", "source", "latent"])


def downgrade() -> None:
    op.drop_index("ix_listed_features_feature", "listed_features")
    op.drop_table("bookmarks")
    op.drop_table("mentions")
    op.drop_table("comments")
