# One image for web, gpu worker and trainer; docker-compose.yml says which is which.
FROM python:3.12-slim

WORKDIR /opt/sae-atlas
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY workers workers
COPY templates templates
COPY static static
COPY migrations migrations
RUN pip install --no-cache-dir --editable ".[worker]" \
    && useradd --create-home atlas \
    && install --directory --owner=atlas /data

USER atlas
ENV SAE_ATLAS_DATA_DIR=/data
VOLUME /data
CMD ["sae-atlas", "demo"]
