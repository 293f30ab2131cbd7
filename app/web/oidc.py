"""Signing in at an OpenID Connect provider: authorization code flow with PKCE, state and nonce. Authlib speaks it."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from app import identities, log, people
from app.errors import NotFound, Unauthorized, Unavailable
from app.identities import Attempt, Claim
from app.settings import Settings
from app.web.access import ANYONE, SignInNeeded, actor_of, address_of, local_path, remember
from app.web.pages import Config

router = APIRouter(prefix="/oidc")
CALLBACK = "/oidc/callback"
_COOKIE = "atlas_oidc"
_SECONDS = 10.0
"""How long the provider may take for an answer."""
_logger = log.get("web")
Text = Annotated[str, Query(max_length=4000)]


@router.get("/start", dependencies=[ANYONE])
async def start(
    request: Request, settings: Config, next: Text = "/", invitation: Text = "", connect: bool = False
) -> Response:
    """Send the browser to the provider."""
    provider = await _provider(request, settings)
    redirect_uri = settings.public_url.rstrip("/") + CALLBACK
    begun = await _asked(provider.create_authorization_url(redirect_uri))
    who = actor_of(request)
    if connect and (who is None or who.by_key):
        raise SignInNeeded("Sign in first; then connect your account.")
    attempt = Attempt(
        data={"nonce": begun["nonce"], "code_verifier": begun["code_verifier"], "redirect_uri": redirect_uri},
        next=local_path(next),
        invitation=invitation[:200],
        person_id=who.id if connect and who is not None else None,
    )
    browser = secrets.token_urlsafe(32)
    await run_in_threadpool(_in_session, request, identities.begin, begun["state"], browser, attempt)
    response = RedirectResponse(begun["url"], 303, {"cache-control": "no-store"})
    secure = settings.public_url.startswith("https:")
    response.set_cookie(
        _cookie(settings),
        browser,
        max_age=60 * identities.ATTEMPT_MINUTES,
        secure=secure,
        httponly=True,
        samesite="lax",
    )
    return response


@router.get("/callback", dependencies=[ANYONE])
async def callback(
    request: Request,
    settings: Config,
    state: Text = "",
    code: Text = "",
    error: Text = "",
    error_description: Text = "",
) -> Response:
    """Take up the sign-in where the provider sends the browser back."""
    provider = await _provider(request, settings)
    browser = request.cookies.get(_cookie(settings), "")
    attempt = await run_in_threadpool(_in_session, request, identities.finish, state, browser)
    if error or not code:
        raise Unauthorized(f"{settings.oidc_name} did not sign you in: {(error_description or error)[:300]!r}.")
    nonce = attempt.data["nonce"]
    sent = {key: attempt.data[key] for key in ("redirect_uri", "code_verifier")}
    token = await _asked(provider.fetch_access_token(code=code, **sent))
    claims = await _asked(_claims(provider, token, nonce, settings))
    secret = await run_in_threadpool(_in_session, request, _sign_in, request, settings, claims, attempt)
    response = RedirectResponse(attempt.next, 303, {"cache-control": "no-store"})
    response.delete_cookie(_cookie(settings), secure=settings.public_url.startswith("https:"), httponly=True)
    remember(response, settings, secret)
    return response


def _sign_in(session: Session, request: Request, settings: Settings, claims: dict[str, Any], attempt: Attempt) -> str:
    verified = claims.get("email_verified") is True
    email = str(claims.get("email") or "") if verified else ""
    called = claims.get("preferred_username") or email or claims.get("name") or "somebody"
    claim = Claim(settings.oidc_issuer, str(claims["sub"]), email, str(called).partition("@")[0])
    domains = [domain.strip().lower() for domain in settings.oidc_domains.split(",") if domain.strip()]
    person = identities.sign_in(session, claim, attempt, domains)
    return people.sign_in(session, person, request.headers.get("user-agent", ""), address_of(request))


def _in_session(request: Request, verb: Any, *asked: Any) -> Any:
    """Call a verb in a transaction of its own: none is held while the provider is asked."""
    with request.app.state.sessions.begin() as session:
        return verb(session, *asked)


async def _claims(provider: Any, token: dict[str, Any], nonce: str, settings: Settings) -> dict[str, Any]:
    """Return what the identity token says, with its signature, issuer, audience, times and nonce checked."""
    wanted = {
        "iss": {"essential": True, "value": settings.oidc_issuer},
        "aud": {"essential": True, "value": settings.oidc_client_id},
    }
    claims = await provider.parse_id_token(token, nonce=nonce, claims_options=wanted)
    if claims is None or not claims.get("sub"):
        raise Unauthorized(f"{settings.oidc_name} did not say who you are.")
    if "email" not in claims and provider.server_metadata.get("userinfo_endpoint"):
        more = await provider.userinfo(token=token)
        if more.get("sub") == claims["sub"]:
            return {**more, **claims}
    return dict(claims)


async def _provider(request: Request, settings: Settings) -> Any:
    """Return the client of the provider, one for the process: it keeps the provider's description and keys."""
    if not settings.team or not settings.oidc_issuer:
        raise NotFound("No provider is set up here; sign in with name and password.")
    state = request.app.state
    if getattr(state, "oidc", None) is None:
        from authlib.integrations.starlette_client import (
            OAuth,
        )  # the [oidc] extra; supervisor.check_address looks for it

        registry: Any = OAuth()
        state.oidc = registry.register(
            "provider",
            client_id=settings.oidc_client_id,
            client_secret=settings.oidc_client_secret or None,
            server_metadata_url=f"{settings.oidc_issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={"scope": "openid email profile", "code_challenge_method": "S256", "timeout": _SECONDS},
        )
    described = await _asked(state.oidc.load_server_metadata())
    if described.get("issuer") != settings.oidc_issuer:
        raise Unavailable(
            f"The provider calls itself {str(described.get('issuer'))[:200]!r}, not {settings.oidc_issuer!r}."
        )
    return state.oidc


async def _asked(question: Any) -> Any:
    """Return the provider's answer. Raises Unavailable when it gives none, Unauthorized when it refuses."""
    import httpx2
    from authlib.common.errors import AuthlibBaseError
    from joserfc.errors import JoseError

    try:
        return await question
    except (AuthlibBaseError, JoseError) as error:
        # The kind of error alone: its words may hold what was sent.
        _logger.warning("sign-in refused", kind=type(error).__name__)
        raise Unauthorized("The provider's answer does not hold good. Sign in again.") from None
    except (httpx2.HTTPError, RuntimeError, ValueError) as error:
        _logger.warning("provider does not answer", kind=type(error).__name__)
        raise Unavailable("The provider for signing in does not answer. Try again in a while.") from None


def _cookie(settings: Settings) -> str:
    return cast(str, f"__Host-{_COOKIE}" if settings.public_url.startswith("https:") else _COOKIE)
