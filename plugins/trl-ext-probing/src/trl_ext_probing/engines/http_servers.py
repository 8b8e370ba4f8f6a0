"""JSON posted to one of several servers in turn, and again until one of them answers."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2

from trl_ext.errors import ConfigurationError

T = TypeVar("T")

TRY_AGAIN = {408, 409, 425, 429}
"""Statuses below 500 that another attempt may not meet: time-outs, conflicts, and too many requests."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, unless the server asks for more."""


class TryAgain(Exception):
    """An attempt failed in a way that another one may not.

    Args:
        reason: What happened.
        after: Seconds that the server asks to wait.
    """

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class HttpServers:
    """Servers of the same model, behind base URLs such as http://localhost:8000/v1.

    Args:
        base_urls: Each attempt goes to the next one; `/v1` is added to a URL without a path.
        api_key_env: Environment variable that holds the key, which no other place may hold.
        timeout: Seconds until an attempt counts as failed.
        retries: Attempts after the first; the pauses before them begin at about half a second and double up to 30 s.

    Raises:
        ConfigurationError: There is no URL, or it is not one, or the variable named is not set.
    """

    def __init__(self, base_urls: Sequence[str], api_key_env: str | None, timeout: float, retries: int) -> None:
        self.urls = [_checked_url(url) for url in base_urls]
        if not self.urls:
            raise ConfigurationError("engine 'server' needs a base_url, such as http://localhost:8000/v1")
        self._turns = itertools.cycle(self.urls)
        self.timeout, self.retries = timeout, retries
        self._headers = _authorization(api_key_env)

    def client(self) -> httpx2.AsyncClient:
        """A client with the key, the time-outs and no limit of connections."""
        timeout = httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout), pool=None)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx2.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)

    async def post(
        self, client: httpx2.AsyncClient, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], T]
    ) -> T:
        """What `read` makes of the answer; it raises `TryAgain` where the answer cannot be used.

        Raises:
            ConfigurationError: The server refuses the request, or no attempt succeeded.
        """
        pause = 0.0
        for attempt in range(self.retries + 1):
            await asyncio.sleep(pause)
            url = f"{next(self._turns)}/{path}"
            try:
                return read(await _answer(client, url, body))
            except TryAgain as error:
                failure, pause = str(error), max(error.after, _pause(attempt))
        raise ConfigurationError(f"{url} gave no usable answer in {attempt + 1} attempts; the last: {failure}")


async def _answer(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one attempt.

    Raises:
        ConfigurationError: The server refuses the request, and would do so again.
        TryAgain: No answer came, the server cannot answer now, or the answer is no JSON object.
    """
    try:
        response = await client.post(url, json=body)
    except httpx2.RequestError as error:
        raise TryAgain(f"{type(error).__name__} {error}") from error
    told = f"status {response.status_code}, {' '.join(response.text.split())[:500]}"
    if response.status_code >= 500 or response.status_code in TRY_AGAIN:
        raise TryAgain(told, after=_retry_after(response))
    if not response.is_success:
        raise ConfigurationError(f"{url} refuses the request: {told}")
    try:
        answer = response.json()
    except ValueError:
        raise TryAgain(told) from None
    if not isinstance(answer, dict):
        raise TryAgain(told)
    return answer


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigurationError(f"base_url {url!r} is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(f"base_url {url!r} is not a URL such as http://localhost:8000/v1")
    return url.rstrip("/") + ("/v1" if parsed.path == "/" else "")


def _authorization(api_key_env: str | None) -> dict[str, str]:
    """The header with the key of the variable; of OPENAI_API_KEY, where there is one, if none is named."""
    key = os.environ.get(api_key_env or "OPENAI_API_KEY")
    if api_key_env and not key:
        raise ConfigurationError(f"api_key_env: the environment has no variable {api_key_env}")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; a date, which the header may also hold, counts as 0."""
    try:
        return float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0


def _pause(attempt: int) -> float:
    """Seconds, between a half and all of an exponentially growing time, so that clients do not come back together."""
    return random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 0.5 * 2.0**attempt)
