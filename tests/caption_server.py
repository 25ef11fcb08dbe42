"""A real HTTP server on loopback that speaks the protocol of chat completions, well or badly."""

import http.server
import json
import threading
import time
from contextlib import contextmanager

ANSWER = {
    "caption": "a red {subject} with white dots",
    "details": [
        {"attribute": "colour", "words": "red", "instead": "blue"},
        {"attribute": "pattern", "words": "white dots", "instead": "yellow stripes"},
    ],
}


def answer(subject: str) -> str:
    return json.dumps(ANSWER).replace("{subject}", subject)


def completion(content: str | None, refusal: str | None = None, finish: str = "stop", usage=(100, 20)) -> dict:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "gpt-4o-as-served",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }  # fmt: skip


class CaptionServer(http.server.ThreadingHTTPServer):
    """Answers requests by `script`, one entry each and the last one for all that follow, or else as it should.

    An entry is (status, body or dict, headers), "silent", "trickling" (a byte now and then), "cut", or a dict: the body
    of a 200.
    """

    daemon_threads = True

    def __init__(self, script=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.requests, self.closing = list(script), [], threading.Event()
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next(self):
        with self.lock:
            if len(self.script) > 1:
                return self.script.pop(0)
            return self.script[0] if self.script else None

    def handle_error(self, *words):
        pass  # a client that went away


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = {"path": self.path, "key": self.headers["Authorization"], "body": body, "at": time.monotonic()}
        self.server.requests.append(said)
        todo = self.server.next()
        if todo is None:
            prompt = body["messages"][0]["content"][0]["text"]
            todo = completion(answer(prompt.partition("one subject, a ")[2].partition(",")[0]))
        if todo == "silent":
            self.server.closing.wait(30)
            return
        if todo == "trickling":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
            return
        status, content, headers = (200, todo, {}) if isinstance(todo, dict | str) else todo
        content = json.dumps(content) if isinstance(content, dict) else content
        data = json.dumps(completion(answer("cat"))).encode() if todo == "cut" else content.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if todo == "cut" else data)
        self.wfile.flush()
        if todo == "cut":
            self.close_connection = True
            self.connection.close()

    def log_message(self, *words):
        pass


@contextmanager
def caption_server(*script):
    server = CaptionServer(script)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
