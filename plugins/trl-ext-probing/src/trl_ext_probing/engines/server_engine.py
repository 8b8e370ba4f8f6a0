"""The engine behind an OpenAI-compatible endpoint: vLLM, SGLang, TGI, `transformers serve`, or a service.

Each completion is a request of its own, with a seed of its own. A request for n completions would get them together,
but servers answer it with fewer or with other ones (`transformers serve` with one, whatever n), and after an
interruption the rest could not be asked for alone. Servers read the prompt once for all where they cache prefixes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal

from trl_ext.errors import ConfigurationError
from trl_ext_probing.engines.disregard import Disregard
from trl_ext_probing.engines.draws import chosen_draws, noise_keys
from trl_ext_probing.engines.http_servers import HttpServers, TryAgain
from trl_ext_probing.engines.interface import Completion, Draw, Prompt, SamplingSettings

Answer = tuple[Completion, int | None]
"""A completion, and the number of its tokens where the server tells."""


class ServerEngine:
    """Samples from one or several OpenAI-compatible servers of the same model; an `Engine`.

    A text goes to `/completions`, messages go to `/chat/completions`. The server decides which tokens end a
    completion, and whether it keeps to the seed. It may also apply the model's own generation settings to what a
    request leaves open: start vLLM with `--generation-config vllm`; `transformers serve` samples only where
    `generation_config.json` says `do_sample`. Log-probabilities are not asked for, since servers differ in whether the
    temperature counts in them; tokens are given where the server tells them (vLLM with
    `extra={"return_token_ids": True}`).

    Args:
        base_url: Such as http://localhost:8000/v1; several take turns.
        model: The model's name on the servers; None leaves the choice to them.
        concurrency: Requests that are open at a time.
        timeout: Seconds until an attempt counts as failed.
        retries: Attempts after the first, for each completion; with 10, a server may be away for about two minutes.
        api_key_env: Environment variable that holds the key; None takes OPENAI_API_KEY where it is set.
        extra: Further fields of each request, such as {"min_p": 0.0}.

    Raises:
        ConfigurationError: A URL is none, the variable of the key is not set, or a number is out of its range.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 10,
        api_key_env: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ConfigurationError(
                f"engine 'server': concurrency={concurrency} must be at least 1, timeout={timeout} above 0 and "
                f"retries={retries} at least 0"
            )
        urls = [base_url] if isinstance(base_url, str) else base_url
        self.servers = HttpServers(urls, api_key_env, timeout, retries)
        self.concurrency = concurrency
        self._every_request = ({"model": model} if model else {}) | dict(extra or {})

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        draws: Sequence[tuple[int, int]] | None = None,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[Completion]:
        """See `Engine.generate`.

        Raises:
            ConfigurationError: A server refuses a request, or no attempt succeeded.
        """
        settings = SamplingSettings(max_tokens, temperature, top_p, top_k)
        chosen = chosen_draws(prompts, n, draws)
        disregard = Disregard(settings)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self.servers.client()) as client:
            requests = (
                (client, prompts[draw.prompt_index], draw, self._fields(settings, key))
                for draw, key in zip(chosen, noise_keys(prompts, chosen, seed), strict=True)
            )
            with closing(self._answers(portal, requests)) as answers:
                for completion, tokens in answers:
                    disregard.note(completion, tokens)
                    yield completion

    def _answers(self, portal: BlockingPortal, requests: Iterator[tuple[Any, ...]]) -> Generator[Answer, None, None]:
        """The answers as they come, with `concurrency` open requests; closing it cancels those."""
        ask = partial(portal.start_task_soon, self._complete)
        open_requests = {ask(*request) for request in islice(requests, self.concurrency)}
        try:
            while open_requests:
                done, open_requests = wait(open_requests, return_when=FIRST_COMPLETED)
                failed = {answer for answer in done if answer.exception() is not None}
                if not failed:
                    open_requests |= {ask(*request) for request in islice(requests, len(done))}
                for answer in (*(done - failed), *failed):
                    yield answer.result()
        finally:
            for answer in open_requests:
                answer.cancel()

    def _fields(self, settings: SamplingSettings, key: int) -> dict[str, Any]:
        """What a request says besides its prompt; `top_k`, which OpenAI does not know, only where it restricts."""
        fields = {
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": key % 2**31,  # some servers take no more bits
        }
        return fields | ({"top_k": settings.top_k} if settings.top_k else {}) | self._every_request

    async def _complete(self, client: httpx2.AsyncClient, prompt: Prompt, draw: Draw, fields: dict[str, Any]) -> Answer:
        path, field = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
        return await self.servers.post(client, path, {field: prompt, **fields}, lambda body: _completion(body, draw))


def _completion(body: Mapping[str, Any], draw: Draw) -> Answer:
    """Of the answer to a request for one completion.

    Raises:
        TryAgain: It holds none.
    """
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"] or "" if "message" in choice else choice["text"]
        reason, tokens = choice["finish_reason"], choice.get("token_ids")
        count = (body.get("usage") or {}).get("completion_tokens")
    except (LookupError, TypeError, AttributeError):
        raise TryAgain(f"no completion in {str(body)[:200]}") from None
    if not isinstance(text, str) or not isinstance(reason, str):
        raise TryAgain(f"no completion in {str(body)[:200]}")
    return Completion(*draw, None if tokens is None else tuple(tokens), text, reason), count
