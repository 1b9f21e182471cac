"""A stand-in for vLLM's command line: same arguments, same endpoints, same process shape.

One child in the session that ignores SIGTERM, as vLLM's engine core outlives a killed API server.
FAKE_VLLM (from launch.json's env) makes it fail: die | no-token | never-ready | port-taken-once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = "import signal,time;signal.signal(signal.SIGTERM,signal.SIG_IGN);time.sleep(600)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    given, rest = parser.parse_known_args()
    how = os.environ.get("FAKE_VLLM", "")
    print("fake vllm", given.model, *rest, flush=True)
    if how == "die":
        sys.exit("RuntimeError: weights are missing")
    if how == "port-taken-once":
        mark = Path(given.model) / "tried"
        if not mark.exists():
            mark.touch()
            sys.exit("OSError: [Errno 98] Address already in use")
    child = subprocess.Popen([sys.executable, "-S", "-c", CHILD])
    signal.signal(signal.SIGTERM, lambda *_: (child.kill(), os._exit(0)))
    while how == "never-ready":
        time.sleep(0.1)
    tokens = 0 if how == "no-token" else 1

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, value: object) -> None:
            data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply("vllm:num_requests_running 0.0\n" if self.path == "/metrics" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert body["model"] == given.served_model_name
            message = {"role": "assistant", "content": "x"}
            self.reply({"choices": [{"message": message}], "usage": {"completion_tokens": tokens}})

    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()
