"""A feature in somebody else's page: `?embed=true` with Neuronpedia's switches, and the page that builds the iframe.

Only what is asked for with `embed=true` may be framed by other sites; guard.py forbids it for everything else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from app import catalog
from app.catalog import FeatureRecord
from app.web.access import VIEWER
from app.web.guard import CONTENT_POLICY
from app.web.pages import Db, base_of, of_query, query, render

if TYPE_CHECKING:
    from app.web.feature import FeaturePage

router = APIRouter()

EMBED_POLICY = CONTENT_POLICY.replace("frame-ancestors 'self'", "frame-ancestors *")
PARTS = {
    "embedexplanation": "label and explanations",
    "embedtest": "box for one's own text",
    "embedplots": "histograms and logits",
    "embedactivations": "top examples",
    "embedsteer": "steering",
    "embedlink": "link to this page",
}
"""What an embedded feature may consist of, in Neuronpedia's words and in ours."""
SWITCHES = ("embed", *PARTS, "defaulttesttext")
HEIGHTS = range(120, 2001)


@dataclass(frozen=True)
class Switches:
    """The switches of an embedded page, named and meant as Neuronpedia does. Everything is shown unless it says no."""

    embed: bool = False
    embedexplanation: bool = True
    embedtest: bool = True
    embedplots: bool = True
    embedactivations: bool = True
    embedsteer: bool = True
    embedlink: bool = True
    defaulttesttext: Annotated[str, Field(max_length=2000)] = ""

    @property
    def fields(self) -> dict[str, str]:
        """Return them as they stand in an address, without those that are as usual."""
        usual = asdict(Switches())
        return {
            name: value if isinstance(value, str) else str(value).lower()
            for name, value in asdict(self).items()
            if value != usual[name]
        }


Embedded = Annotated[Switches, of_query(Switches)]


@dataclass(frozen=True)
class EmbeddedPage:
    feature: FeaturePage
    switches: Switches


@dataclass(frozen=True)
class Builder:
    """What is chosen for an iframe, and its code."""

    record: FeatureRecord
    base: str
    switches: Switches
    height: int

    @property
    def parts(self) -> tuple[tuple[str, str, bool], ...]:
        """Name, words, and whether it is chosen."""
        chosen = asdict(self.switches)
        return tuple((name, words, bool(chosen[name])) for name, words in PARTS.items())

    @property
    def address(self) -> str:
        return self.record.path + query(self.switches.fields)

    @property
    def code(self) -> str:
        """The element to paste; the template escapes it once more, since it is shown as text."""
        title = f"Feature {self.record.feature.index} of {self.record.source.name}"
        address = f"{self.base}{self.address}".replace("&", "&amp;")
        return f'<iframe src="{address}" title="{title}" width="540" height="{self.height}" style="border:0"></iframe>'


def embedded(request: Request, page: FeaturePage, switches: Switches) -> Response:
    """Return a feature's page for an iframe, with the header that lets other sites frame it."""
    headers = {"content-security-policy": EMBED_POLICY, "cross-origin-resource-policy": "cross-origin"}
    return render(request, "embed.html", EmbeddedPage(page, switches), headers=headers)


@router.get("/{model}/{source}/{index}/embed", dependencies=[VIEWER])
def builder(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    part: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006 - FastAPI copies it
    defaulttesttext: Annotated[str, Query(max_length=2000)] = "",
    height: Annotated[int, Query(ge=HEIGHTS.start, lt=HEIGHTS.stop)] = 480,
) -> Response:
    """Show the iframe's code with a preview. `part` is each part wanted; without any, all are."""
    record = catalog.feature_record(session, model, source, catalog.parse_index(index))
    wanted: dict[str, Any] = {name: not part or name in part for name in PARTS}
    switches = Switches(embed=True, defaulttesttext=defaulttesttext, **wanted)
    return render(request, "embedding.html", Builder(record, base_of(request), switches, height))
