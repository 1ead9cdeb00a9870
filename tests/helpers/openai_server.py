"""A server that answers as OpenAI's and vLLM's do, with a model that transformers runs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import torch


@dataclass
class Engine:
    """What is served, and which habits of servers it has."""

    model: Any
    tokenizer: Any
    name: str = "tiny"
    echo: bool = True  # as vLLM has and llama.cpp has not
    log_probabilities: bool = True
    lead: tuple[int, ...] = ()  # what it puts before a text
    asked: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, wish: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(wish)
        prompt = wish["prompt"]
        if isinstance(prompt, str):
            prompt = [*self.lead, *self.tokenizer(prompt)["input_ids"]]
        usage = {"prompt_tokens": len(prompt)}
        return {"choices": [{"text": "", "logprobs": self.said(prompt, wish)}], "usage": usage}

    @torch.no_grad()
    def said(self, tokens: list[int], wish: dict[str, Any]) -> Any:
        if not self.log_probabilities or "logprobs" not in wish:
            return None
        found = self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        if wish.get("echo"):
            given = [found[place, token].item() for place, token in enumerate(tokens[1:])]
            return {"token_logprobs": [None, *given, -1.0]}
        values, best = found[-1].topk(wish["logprobs"])
        pairs = zip(best.tolist(), values.tolist(), strict=True)
        return {"content": [{"top_logprobs": [{"id": i, "logprob": v} for i, v in pairs]}]}


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The address of a server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            self._send(200 if known else 404, {"data": [{"id": engine.name}]} if known else {})

        def do_POST(self) -> None:
            wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if wish.get("echo") and not engine.echo:
                self._send(500, {"error": {"message": "Only no echo is supported"}})
            else:
                self._send(200, engine.answer(wish))

        def _send(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
