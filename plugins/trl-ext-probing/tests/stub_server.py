"""A server in the tests' own process that answers as OpenAI-compatible ones do, or fails as they do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""A status and a body; status 0 hangs up."""


class Stub:
    """A server whose answers are those of `answer`, a function of the path, the body and the number of the request."""

    def __init__(self, answer: Callable[[str, dict[str, Any], int], Answer]) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[Any] = []
        self.open = self.most_open = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.requests)
                    stub.requests.append((self.path, body))
                    stub.headers.append(self.headers)
                    stub.open += 1
                    stub.most_open = max(stub.most_open, stub.open)
                status, content = answer(self.path, body, number)
                with lock:
                    stub.open -= 1
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop; nothing listens at the port from now on, since no thread waits at its socket any longer."""
        self.server.shutdown()
        self.server.server_close()


def told(path: str, body: dict[str, Any], _: int = 0) -> Answer:
    """What a good server says: here the seed, in words."""
    text = f"seed {body['seed']}"
    said = {"message": {"content": text}} if "chat" in path else {"text": text}
    return 200, {"choices": [{**said, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
