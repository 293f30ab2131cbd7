"""YAML that people paste or send: read within limits of size, depth and number, and written back. No I/O."""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from app.errors import BadInput

MAX_BYTES = 262_144
MAX_DEPTH = 12
MAX_NODES = 20_000


class _Loader(yaml.SafeLoader):
    """As SafeLoader, but 1e-4 is a number, and a key given twice is a mistake rather than overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise BadInput(f"{name} is given twice, the second time in line {key.start_mark.line + 1}.")
            seen.add(name)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(text: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds. Raises BadInput in words, with the line where there is one."""
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise BadInput(f"The YAML is {size:,} bytes; up to {MAX_BYTES:,} are read.")
    try:
        _check(text)
        found: Any = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise BadInput(f"This is no YAML: {_words(error)}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"This YAML cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise BadInput(f"A spec is made of lines such as `model: NAME`; this YAML is a {_kind(found)}.")
    return {str(name): value for name, value in cast(dict[Any, Any], found).items()}


def dump(fields: dict[str, Any]) -> str:
    """Return fields as YAML, lists in one line."""
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


class _Dumper(yaml.SafeDumper):
    pass


def _short_lists(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flow = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)


_Dumper.add_representer(list, _short_lists)


def _check(text: str) -> None:
    """Walk the events, which takes no recursion, before anything is built."""
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, yaml.SafeLoader), 1):
        if isinstance(event, yaml.AliasEvent):
            raise BadInput(
                f"Line {event.start_mark.line + 1} refers to *{event.anchor}; references are not read. Write the value "
                "out, or give it outside `saes`: it is everyone's there."
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise BadInput(f"The YAML is nested more than {MAX_DEPTH} deep in line {event.start_mark.line + 1}.")
        if nodes > MAX_NODES:
            raise BadInput(f"The YAML holds more than {MAX_NODES:,} values.")


def _words(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}."
    return f"{str(error).splitlines()[0][:200]}."


def _kind(value: object) -> str:
    return {"list": "list", "NoneType": "blank"}.get(type(value).__name__, "single value")
