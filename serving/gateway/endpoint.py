"""Where calls go: a replica's address, its deadlines, and the heads of requests to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, PositiveFloat
from yarl import URL

from contracts.errors import ConfigError
from serving.gateway.api_request import PATHS, Kind
from serving.gateway.http_connection import Origin
from serving.gateway.upstream_errors import Dialect


class Timeouts(BaseModel):
    """Seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect: PositiveFloat = 2.0  # TCP and TLS
    first_byte: PositiveFloat = 120.0  # the engine's queue and its prefill
    stall: PositiveFloat = 30.0  # between two reads
    unstreamed: PositiveFloat = 600.0  # an answer in one piece, which shows nothing before its end
    whole: PositiveFloat = 1800.0  # a stream, dripping ones included


@dataclass(frozen=True)
class Endpoint:
    """One replica of one model: what a call needs to know. ``url`` is without ``/v1``."""

    provider: str  # a label: bounded by the configuration
    url: str
    model: str  # the upstream's name for it
    dialect: Dialect = "openai"
    api_key: str = field(default="", repr=False)
    timeouts: Timeouts = field(default_factory=Timeouts)
    # Made once: yarl costs more than the rest of a call.
    urls: dict[Kind, URL] = field(default_factory=dict, init=False, repr=False, compare=False)
    origin: Origin = field(init=False, repr=False, compare=False)
    heads: dict[Kind, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        base = self.url.rstrip("/")
        self.urls.update({kind: URL(base + path) for kind, path in PATHS.items()})
        object.__setattr__(self, "origin", origin_of(self.urls["chat"]))
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError(
                "An API key has characters that no header may have.",
                where=f"provider '{self.provider}'",
                next="look for a line end or a letter that is not ASCII in its variable",
            )
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        self.heads.update(
            {
                kind: request_line("POST", url) + b"content-type: application/json\r\n"
                b"accept: */*\r\n" + key.encode("latin-1")
                for kind, url in self.urls.items()
            }
        )


def origin_of(url: URL) -> Origin:
    """Where connections for a URL go."""
    tls = url.scheme == "https"
    return Origin(url.raw_host or "", url.port or (443 if tls else 80), tls)


def request_line(method: str, url: URL) -> bytes:
    """The beginning of a head. Bodies are wanted as they are: they are searched and relayed."""
    host = url.host_port_subcomponent or ""
    lines = f"{method} {url.raw_path_qs} HTTP/1.1\r\nhost: {host}\r\naccept-encoding: identity\r\n"
    return lines.encode("latin-1")
