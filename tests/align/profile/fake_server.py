"""A serving engine as the runner sees one. FAKE_SERVER chooses how it behaves, comma-separated.

die: ends at once · raise: by an exception · never: never healthy · refuse: completions answer 500 ·
short: one token too few · slow: completions take a minute · unhurried: they take a quarter of a
second · stubborn: ignores SIGINT and SIGTERM · worker: has a child process in a session of its own
· nolabels: knows no /start_profile · norpc: knows no /collective_rpc · nomodule: has no module of
the layer to capture · slowrpc: takes a minute to begin capturing · nothing: captures no inputs ·
forgets: writes no capture.

FAKE_ENVIRONMENT: the file to which it writes its arguments and variables.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

try:
    import nvtx
except ImportError:
    nvtx = None

HOW = os.environ.get("FAKE_SERVER", "").split(",")
HEALTHY_AT = time.monotonic() + 0.3
capture = None  # what opkit_capture_start was told
labelled = False  # as vLLM: steps are labelled once /start_profile was asked for


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health":
            ready = time.monotonic() > HEALTHY_AT and "never" not in HOW
            self.answer(200 if ready else 503, {})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "tiny"}]})
        elif self.path == "/version":
            self.answer(200, {"version": "1.2.3"})
        else:
            self.answer(404, {})

    def do_POST(self):
        global capture, labelled
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(os.environ["FAKE_REQUESTS"], "a") as log:
            log.write(json.dumps({"path": self.path, **body}) + "\n")
        if self.path == "/start_profile":
            labelled = "nolabels" not in HOW
            self.answer(200 if labelled else 404, {})
            return
        if self.path == "/collective_rpc":
            self.answer(self.rpc(body), {"results": [{}]})
            return
        if "slow" in HOW:
            time.sleep(60)
        if "refuse" in HOW:
            self.answer(500, {"error": "EngineCore encountered an issue"})
            return
        prompts = body["prompt"]
        label = f"execute_context_{len(prompts)}({sum(map(len, prompts))})_generation_0(0)"
        with nvtx.annotate(label) if nvtx and labelled else nullcontext():
            time.sleep(0.25 if "unhurried" in HOW else 0.01)
        tokens = len(prompts) * body["max_tokens"] - ("short" in HOW)
        told = {"usage": {"completion_tokens": tokens}}
        if body.get("return_token_ids"):  # the last prompt first: an answer names its place
            numbers = range(len(prompts))
            told["choices"] = [
                {"index": n, "token_ids": [100 * n + i for i in range(body["max_tokens"])]}
                for n in reversed(numbers)
            ]
        self.answer(200, told)

    def rpc(self, body):
        """As opkit's worker extension, which stores what the requests in between were given."""
        global capture
        if "norpc" in HOW or os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
            return 404
        if body["method"] == "opkit_capture_start":
            capture = json.loads(*body["args"])
            if "slowrpc" in HOW:
                time.sleep(60)
            return 500 if "nomodule" in HOW else 200
        if "forgets" in HOW:
            return 200
        folder = Path(capture["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        told = {name: capture[name] for name in ("op", "backend", "layer", "seed")}
        lengths = {} if "nothing" in HOW else {"8-0": 9}
        made = {"schema": "opkit.capture/1", **told, "lengths": lengths}
        (folder / "capture.json").write_text(json.dumps(made))
        return 200

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


print("engine starting", flush=True)
if "FAKE_ENVIRONMENT" in os.environ:
    Path(os.environ["FAKE_ENVIRONMENT"]).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
if "die" in HOW:
    sys.exit("RuntimeError: CUDA out of memory")
if "raise" in HOW:
    print("\x1b[31mloading weights\x1b[0m", flush=True)
    raise ValueError("no valid attention backend for head_size 7")
if "stubborn" in HOW:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "worker" in HOW:
    sleep = "import time; time.sleep(120)"
    subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
try:
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
except KeyboardInterrupt:
    print("engine ended politely", flush=True)
