"""An OpenID Connect provider as a process of its own, for tests: `python -m tests.oidc_provider PORT`.

It keeps to the protocol as strictly as it can: one client with a secret, exact redirect addresses, PKCE by S256 alone,
codes that count once. Whoever sends the browser to it chooses the person by `as=NAME` and a fault by `fault=KIND`.
"""

from __future__ import annotations

import base64
import hmac
import secrets
import sys
import time
from typing import Any
from urllib.parse import urlencode

import uvicorn
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

CLIENT_ID, CLIENT_SECRET = "atlas-client", "the-clients-secret-7f3a"
PEOPLE = {
    "ada": {"sub": "u-1", "email": "ada@lab.example", "email_verified": True, "preferred_username": "Ada"},
    "grace": {"sub": "u-2", "email": "grace@elsewhere.example", "email_verified": True, "preferred_username": "grace"},
    "mallory": {"sub": "u-3", "email": "boss@lab.example", "email_verified": False, "preferred_username": "a-admin"},
    "namesake": {"sub": "u-4", "email": "a-admin@lab.example", "email_verified": True, "preferred_username": "a-admin"},
}


def create_app(issuer: str) -> Starlette:
    key = RSAKey.generate_key(2048, {"kid": "k1", "use": "sig", "alg": "RS256"})
    other = RSAKey.generate_key(2048, {"kid": "k1", "use": "sig", "alg": "RS256"})
    codes: dict[str, dict[str, Any]] = {}
    tokens: dict[str, dict[str, Any]] = {}

    async def description(_: Request) -> Response:
        return JSONResponse(
            {
                "issuer": issuer,
                "authorization_endpoint": f"{issuer}/authorize",
                "token_endpoint": f"{issuer}/token",
                "userinfo_endpoint": f"{issuer}/userinfo",
                "jwks_uri": f"{issuer}/jwks",
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "code_challenge_methods_supported": ["S256"],
                "token_endpoint_auth_methods_supported": ["client_secret_basic"],
            }
        )

    async def jwks(_: Request) -> Response:
        return JSONResponse({"keys": [key.as_dict(private=False)]})

    async def authorize(request: Request) -> Response:
        asked = dict(request.query_params)
        wrong = [
            name
            for name, good in {
                "client_id": asked.get("client_id") == CLIENT_ID,
                "response_type": asked.get("response_type") == "code",
                "scope": "openid" in asked.get("scope", "").split(),
                "state": len(asked.get("state", "")) >= 16,
                "nonce": len(asked.get("nonce", "")) >= 16,
                "code_challenge": len(asked.get("code_challenge", "")) == 43,
                "code_challenge_method": asked.get("code_challenge_method") == "S256",
            }.items()
            if not good
        ]
        if wrong:
            return PlainTextResponse(f"refused: {', '.join(wrong)}", 400)
        back = {"state": asked["state"]}
        if asked.get("fault") == "denied":
            back |= {"error": "access_denied", "error_description": "Not today"}
        else:
            code = secrets.token_urlsafe(24)
            codes[code] = asked
            back |= {"code": code}
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode(back)}", 302)

    async def token(request: Request) -> Response:
        form = await request.form()
        given = base64.b64decode(request.headers.get("authorization", "").partition(" ")[2] or "Og==").decode()
        if not hmac.compare_digest(given, f"{CLIENT_ID}:{CLIENT_SECRET}"):
            return JSONResponse({"error": "invalid_client"}, 401)
        asked = codes.pop(str(form.get("code")), None)
        if (
            asked is None
            or form.get("redirect_uri") != asked["redirect_uri"]
            or create_s256_code_challenge(str(form.get("code_verifier"))) != asked["code_challenge"]
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        who, fault, now = PEOPLE[asked["as"]], asked.get("fault", ""), int(time.time())
        claims = {
            "iss": "http://evil.example" if fault == "issuer" else issuer,
            "aud": "another-client" if fault == "audience" else CLIENT_ID,
            "iat": now - (7200 if fault == "expired" else 0),
            "exp": now + (-3600 if fault == "expired" else 300),
            "nonce": "another nonce altogether" if fault == "nonce" else asked["nonce"],
            "sub": who["sub"],
        }
        if fault != "sparse":
            claims |= who
        signed = jwt.encode({"alg": "RS256", "kid": "k1"}, claims, other if fault == "key" else key)
        access = secrets.token_urlsafe(24)
        tokens[access] = who
        return JSONResponse(
            {"access_token": access, "token_type": "Bearer", "expires_in": 300, "id_token": signed, "scope": "openid"}
        )

    async def userinfo(request: Request) -> Response:
        who = tokens.get(request.headers.get("authorization", "").partition(" ")[2])
        return JSONResponse(who or {"error": "invalid_token"}, 200 if who else 401)

    return Starlette(
        routes=[
            Route("/.well-known/openid-configuration", description),
            Route("/jwks", jwks),
            Route("/authorize", authorize),
            Route("/token", token, methods=["POST"]),
            Route("/userinfo", userinfo),
        ]
    )


if __name__ == "__main__":
    port = int(sys.argv[1])
    uvicorn.run(create_app(f"http://127.0.0.1:{port}"), host="127.0.0.1", port=port, log_level="warning")
