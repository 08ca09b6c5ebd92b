"""An OpenAI-compatible endpoint on loopback, for tests of whoever asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any], BaseHTTPRequestHandler], Any]


class Endpoint:
    """Answers as a test likes: a text, (status, bytes), or None where the test has written to the handler itself."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append(question)
                outer.heads.append({name.lower(): value for name, value in self.headers.items()})
                answer = reply(question, self)
                if answer is None:
                    return
                status, data, *more = answer if isinstance(answer, tuple) else (200, completion(answer))
                self.send_response(status)
                for name, value in more[0].items() if more else ():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:  # a client that hung up is what some tests are about
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: Any, *, reason: str | None = None) -> bytes:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [choice | ({"finish_reason": reason} if reason else {})]}).encode()
