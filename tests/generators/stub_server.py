"""Stands for vLLM's server where only its start and its end matter; takes the server's arguments, and answers with what it was given.

By STUB in its environment it is well, "deaf" (never ready), "broken" (dies at start) or "stubborn" (is not told to end).
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOOD = os.environ.get("STUB", "")
WORKER = subprocess.Popen(["sleep", "60"])  # as vLLM has processes of its own


class Stub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._say(503 if MOOD == "deaf" else 200, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["messages"][-1]["content"] == "die":
            print("ERROR 11-24 08:07:56 [core.py:1510] RuntimeError: no memory left", flush=True)
            os._exit(1)
        given = {
            "arguments": sys.argv[1:],
            "environment": dict(os.environ),
            "key": self.headers["Authorization"],
            "model": asked["model"],
            "worker": WORKER.pid,
            "group": os.getpgrp(),
        }
        said = {"role": "assistant", "content": json.dumps(given)}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self._say(200, {"choices": [{"index": 0, "message": said, "finish_reason": "stop"}], "usage": usage})

    def _say(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        pass  # a client that has gone is nothing to tell


if __name__ == "__main__":
    if MOOD == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), flush=True)
        time.sleep(600)
    if MOOD == "broken":
        sys.exit("stub_server.py: error: unrecognized arguments: --no-such-thing")
    print("ready", flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    Server(("127.0.0.1", port), Stub).serve_forever()
