"""Where a model answers over HTTP as OpenAI's do, and how long it is waited for. Keys stand in the environment alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tutelage.base.errors import UserError

TRIES = 50  # places of a text at which a JSON object may begin
ADDRESS = "OPENAI_BASE_URL"  # in the environment: the address where a recipe gives none


class Endpoint(BaseModel):
    """An OpenAI-compatible endpoint. Only `model` and `options` say what is answered, and enter fingerprints."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str = Field(description="its name there")
    url: str | None = Field(
        None, exclude=True, description=f"such as http://127.0.0.1:8000/v1; else the environment's {ADDRESS}"
    )
    key_env: str | None = Field(None, exclude=True, description="the environment's variable that holds the key")
    timeout: float = Field(120.0, gt=0, exclude=True, description="seconds for a whole reply")
    tries: int = Field(5, ge=1, le=20, exclude=True, description="of a request, waiting longer before each")
    parallel: int = Field(8, ge=1, le=256, exclude=True, description="requests at once")
    options: dict[str, Any] = Field(
        default_factory=dict, description="sent with each request; null leaves a usual one out"
    )

    @field_validator("url")
    @classmethod
    def _is_one(cls, value: str | None) -> str | None:
        if value is not None:
            checked(value, what="endpoint.url")
        return value

    def address(self) -> str:
        """The recipe's address, or the environment's. UserError where there is none."""
        found = self.url or os.environ.get(ADDRESS)
        if not found:
            raise UserError(
                f"endpoint: give its address as `url: http://host:port/v1`, or in the environment as {ADDRESS}"
            )
        return checked(found, what="endpoint.url")

    def key(self) -> str | None:
        """The key, read when it is needed. UserError where the environment has no such variable."""
        if self.key_env is None:
            return None
        if not os.environ.get(self.key_env):
            raise UserError(f"endpoint.key_env: the environment has no {self.key_env}")
        return os.environ[self.key_env]


def checked(url: str, *, what: str) -> str:
    """An address without its last slash. UserError for what is none; one that holds a password is not repeated."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        right, parts = False, urlsplit("")
    if parts.username is not None or parts.password is not None:
        raise UserError(f"{what}: an address holds no name or password, for it is written down; see key_env")
    if not right:
        raise UserError(f"{what}: '{url}' is not a URL such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def is_local(url: str) -> bool:
    """Whether it is this machine, which no proxy stands before."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in what a model said, in order; around them it may think aloud."""
    at = 0
    for _ in range(TRIES):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        yield value
