"""The web process's application: `create_app(settings)` wires database, worker client, pages, JSON API and guards."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.gzip import GZipMiddleware

from app import db
from app.api import (
    activations,
    attribution,
    batches,
    evaluate,
    explanations,
    features,
    health,
    queue,
    share,
    steer,
    steer_lab,
    tokenize,
    train,
    unknown,
    vector,
)
from app.api import (
    comments as comments_api,
)
from app.api import (
    lists as lists_api,
)
from app.gpu import Worker
from app.labelindex import LabelIndex
from app.operations import Sizes
from app.readings import Reader
from app.settings import Settings
from app.web import (
    account,
    activity,
    admin,
    audit,
    bookmarks,
    bulk,
    cards,
    comments,
    compare,
    corpora,
    docs,
    embed,
    exchange,
    feature,
    harvests,
    home,
    job,
    lists,
    live,
    loading,
    map,
    oidc,
    palette,
    people,
    preview,
    prompt,
    remotes,
    search,
    sharing,
    source,
    steering,
    tracing,
    trash,
    upload,
    vectors,
)
from app.web import (
    explanations as explanation_pages,
)
from app.web import (
    train as train_pages,
)
from app.web.access import Rates
from app.web.audit import Audit
from app.web.guard import Guard, LargerBodies
from app.web.measures import Measured, Measures
from app.web.multipart import SLACK_BYTES
from app.web.pages import Pages, VersionedStatic, static_version
from app.web.problems import register
from app.web.proxy import Proxied
from app.web.visits import Visits

MAX_BODY_BYTES = 2**25


def create_app(settings: Settings) -> FastAPI:
    """Return the application. Its lifespan opens the catalog, whose schema must be the code's, and the worker."""

    tracing_provider = tracing.provider_of(settings) if settings.otel_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        engine = db.connect(settings)
        db.check_schema(engine)
        app.state.engine = engine
        app.state.sessions = db.sessions(engine)
        app.state.worker = Worker(settings)
        app.state.labels = LabelIndex(app.state.sessions)
        app.state.visits = Visits(app.state.sessions)
        try:
            yield
        finally:
            if tracing_provider is not None:
                tracing_provider.shutdown()
            await app.state.worker.close()
            app.state.visits.close()
            engine.dispose()

    app = FastAPI(
        title="SAE Atlas",
        summary="Features of sparse autoencoders: wire-compatible with Neuronpedia's API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    version = static_version()
    app.state.settings = settings
    app.state.pages = Pages(version)
    app.state.measures = Measures()
    app.state.readings = Reader()
    app.state.sizes = Sizes(settings)
    app.state.rates = Rates(settings.requests_per_minute)
    register(app)
    if settings.team:
        app.add_middleware(Audit)
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=2)
    # Counts bodies that come in chunks; Guard has refused those that say their length.
    # Uploads count for themselves and have a sentence for it; LargerBodies is only a stop behind that.
    largest = {
        upload.PATH: settings.max_sae_bytes,
        corpora.PATH: settings.max_corpus_bytes,
        exchange.PATH: settings.max_import_bytes,
    }
    larger = {path: most + SLACK_BYTES for path, most in largest.items()}
    app.add_middleware(LargerBodies, larger={path: 2 * most for path, most in larger.items()})
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)
    app.add_middleware(Guard, public_url=settings.public_url, max_body_bytes=MAX_BODY_BYTES, larger=larger)
    app.add_middleware(Measured, measures=app.state.measures)
    if tracing_provider is not None:
        app.add_middleware(tracing.Traced, provider=tracing_provider)
    if settings.team:
        app.add_middleware(Proxied, trusted=settings.trusted_proxies)
    app.mount("/static", VersionedStatic(version), name="static")
    app.include_router(feature.first, include_in_schema=False)
    for api in (
        features,
        explanations,
        activations,
        attribution,
        batches,
        steer,
        steer_lab,
        vector,
        tokenize,
        queue,
        train,
        evaluate,
        lists_api,
        share,
        comments_api,
        unknown,
    ):
        app.include_router(api.router, prefix="/api")
    app.include_router(health.router)
    for pages in (
        home,
        account,
        activity,
        oidc,
        admin,
        people,
        audit,
        bulk,
        cards,
        compare,
        corpora,
        harvests,
        exchange,
        remotes,
        docs,
        job,
        live,
        lists,
        bookmarks,
        comments,
        search,
        sharing,
        palette,
        trash,
        upload,
        vectors,
        train_pages,
        loading,
        steering,
        prompt,
        map,
        source,
        embed,
        explanation_pages,
        preview,
    ):
        app.include_router(pages.router, include_in_schema=False)
    # Last: its /{model}/{source}/{index} matches any three segments.
    app.include_router(feature.router, include_in_schema=False)
    return app
