# Two images from one file: `web` has no torch, `worker` has it and runs gpu worker and trainer.
#   docker build --target web -t sae-atlas-web .
#   docker build --target worker -t sae-atlas-worker .
FROM python:3.12-slim AS base
WORKDIR /opt/sae-atlas
# As numbers, so that Kubernetes' runAsNonRoot can tell.
RUN groupadd --gid 10001 atlas && useradd --uid 10001 --gid 10001 --create-home atlas \
    && install --directory --owner=atlas --group=atlas /data /run/atlas
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY workers workers
COPY templates templates
COPY static static
COPY migrations migrations
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    SAE_ATLAS_DATA_DIR=/data SAE_ATLAS_WORKER_SOCKET=/run/atlas/worker.sock
VOLUME /data

FROM base AS web
RUN pip install --no-cache-dir --editable .[oidc]
USER 10001:10001
EXPOSE 3000
CMD ["python", "-m", "app"]

FROM base AS worker
RUN pip install --no-cache-dir --editable ".[worker,data]"
USER 10001:10001
CMD ["sae-atlas", "demo"]
