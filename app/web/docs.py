"""The JSON API's documentation, from its OpenAPI description, without scripts from elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.web.access import VIEWER
from app.web.pages import render

router = APIRouter()


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    about: str
    fields: tuple[tuple[str, str, bool, str], ...]
    """Name, type, whether it must be there, what it is."""


@dataclass(frozen=True)
class DocsPage:
    groups: tuple[tuple[str, tuple[Operation, ...]], ...]
    base: str


@router.get("/docs", dependencies=[VIEWER])
def docs(request: Request) -> Response:
    spec = request.app.openapi()
    schemas: dict[str, Any] = spec.get("components", {}).get("schemas", {})
    groups: dict[str, list[Operation]] = {}
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            about = operation.get("description") or operation.get("summary", "")
            found = Operation(method.upper(), path, about, tuple(_fields(operation, schemas)))
            groups.setdefault((operation.get("tags") or ["other"])[0], []).append(found)
    base = f"{request.url.scheme}://{request.url.netloc}"
    return render(request, "docs.html", DocsPage(tuple((tag, tuple(ops)) for tag, ops in groups.items()), base))


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, str, bool, str]]:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    shape = _resolved(body, schemas)
    if shape.get("type") == "array":
        shape = _resolved(shape.get("items", {}), schemas)
    required = set(shape.get("required", ()))
    return [
        (name, _type(field), name in required, _about(field)) for name, field in shape.get("properties", {}).items()
    ]


def _resolved(shape: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    reference = shape.get("$ref")
    return schemas.get(reference.rpartition("/")[2], {}) if reference else shape


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if field.get("type") == "array":
        return f"[{_type(field.get('items', {}))}]"
    return str(field.get("type", "any"))


def _about(field: dict[str, Any]) -> str:
    default = f"Default: {json.dumps(field['default'])}." if "default" in field else ""
    return " ".join(part for part in (field.get("description", ""), default) if part)
