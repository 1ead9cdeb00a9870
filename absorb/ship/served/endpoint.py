"""What an OpenAI-compatible server says of tokens: vLLM, llama.cpp, SGLang.

The first and the last give log-probabilities of a prompt (`echo`). llama.cpp refuses that, and is
asked what comes after each beginning of the text instead.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from absorb.errors import AbsorbError
from absorb.schema.places import Endpoint

_PATIENCE = 120  # seconds, for one answer
_CHOICES = 5  # of the next token, where a server tells of no other
_STRANGE = (AttributeError, LookupError, TypeError, ValueError)  # where JSON has another form
Answers = list[dict[int, float]]  # for each token but the first: log-probabilities by token


@dataclass(frozen=True, slots=True)
class Server:
    """A model that a server offers."""

    url: str
    model: str

    def said(self, tokens: Sequence[int]) -> Answers:
        """Log-probabilities of what may follow each beginning of a text, natural logarithms."""
        try:
            answer = self._complete(tokens, echo=True, logprobs=1)
        except _RefusedError:
            answer = None  # it may have no echo
        try:
            echoed = [*answer["choices"][0]["logprobs"]["token_logprobs"]][: len(tokens)]
            if len(echoed) == len(tokens):
                pairs = zip(tokens[1:], echoed[1:], strict=True)
                return [{token: float(value)} for token, value in pairs]
        except _STRANGE:
            pass
        return [self._following(tokens[:count]) for count in range(1, len(tokens))]

    def _following(self, tokens: Sequence[int]) -> dict[int, float]:
        answer = self._complete(tokens, logprobs=_CHOICES)
        try:
            given = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return {int(one["id"]): float(one["logprob"]) for one in given}
        except _STRANGE as error:
            raise AbsorbError(
                f"{self.url} offers no log-probabilities of tokens by their number; serve the "
                "model by vLLM, llama.cpp or SGLang, and compare with that"
            ) from error

    def tokens_of(self, text: str) -> int | None:
        """As how many tokens the server reads a text, if it says so."""
        try:
            answer = self._complete(text)
        except _RefusedError:
            return None
        try:
            return int(answer["usage"]["prompt_tokens"])
        except _STRANGE:
            return None

    def _complete(self, prompt: Sequence[int] | str, **more: Any) -> Any:
        given = prompt if isinstance(prompt, str) else [*prompt]
        wish = {"model": self.model, "prompt": given, "max_tokens": 1, "temperature": 0, **more}
        return _asked(f"{self.url}/completions", wish)


def server_at(wish: Endpoint) -> Server:
    """The model that is meant, of those that a server says it has."""
    url = str(wish.url).rstrip("/").removesuffix("/v1") + "/v1"
    offered = _asked(f"{url}/models")
    try:
        names = [str(one["id"]) for one in offered["data"]]
    except _STRANGE as error:
        raise AbsorbError(
            f"{url} does not answer as OpenAI's servers do; check --endpoint"
        ) from error
    if not names:
        raise AbsorbError(f"{url} serves no model; start it with one")
    if wish.served is not None and wish.served not in names:
        raise AbsorbError(
            f"{url} serves {', '.join(names)} and no {wish.served}; pass one of them as --model"
        )
    return Server(url, wish.served or names[0])


class _RefusedError(AbsorbError):
    """The server is there, and does not do what it was asked for."""


def _asked(url: str, wish: dict[str, Any] | None = None) -> Any:
    """The JSON that a server answers with, None where it is none."""
    body = None if wish is None else json.dumps(wish).encode()
    try:
        request = Request(url, body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=_PATIENCE) as answer:
            said = answer.read()
    except HTTPError as error:
        reason = " ".join(error.read(300).decode(errors="replace").split())
        raise _RefusedError(
            f"{url} refuses what it is asked (HTTP status {error.code}: {reason}); check "
            "--endpoint and --model"
        ) from error
    except (HTTPException, OSError, ValueError) as error:
        raise AbsorbError(
            f"{url} does not answer ({error}); start the server, or check --endpoint"
        ) from error
    try:
        return json.loads(said)
    except ValueError:
        return None
