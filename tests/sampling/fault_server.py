"""A small OpenAI-compatible server that answers, or fails, as a script says, and counts what it is asked."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One HTTP answer: its `body` is sent as JSON unless it is bytes; `cut` sends half of it and closes the connection, and
    `drip` waits so many seconds behind each byte."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False
    drip: float = 0.0


def choice(text: str | None, finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason, **more}


def chat(*texts: str | dict | None, tokens: int = 10) -> Reply:
    """A completion with one choice for each text, which has used 2 prompt tokens and `tokens` completion tokens."""
    choices = [text if isinstance(text, dict) else choice(text) for text in texts]
    usage = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": tokens + 2}
    return Reply({"object": "chat.completion", "choices": choices, "usage": usage})


def error(status: int, message: str, **headers: str) -> Reply:
    return Reply({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


Script = Callable[[dict[str, Any], int], Reply]


class FaultServer:
    """
    A context manager that serves on a free port of 127.0.0.1.

    Args:
        script (`Callable`): Makes the `Reply` to a request's JSON body and its number, counted from 0.

    Attributes:
        bodies (`list[dict]`): What was asked, in order of arrival.
        authorizations (`list[str]`): The header of each request.
        most_at_once (`int`): Most requests that were under way together.
    """

    def __init__(self, script: Script):
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                owner._answer(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):  # a client that has gone away
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "FaultServer":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def count(self) -> int:
        return len(self.bodies)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.authorizations.append(handler.headers["Authorization"])
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.script(body, number)
            time.sleep(reply.delay)
        finally:
            with self._lock:
                self._now -= 1
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for byte in data if reply.drip else ():
            handler.wfile.write(bytes([byte]))
            time.sleep(reply.drip)
        if not reply.drip:
            handler.wfile.write(data[: len(data) // 2] if reply.cut else data)
        handler.close_connection = handler.close_connection or reply.cut
