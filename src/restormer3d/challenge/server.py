"""The invoke protocol: the same job behind HTTP, again and again in one process that has read the weights once.

Requests come in on threads of their own, so that GET /health is answered while a job runs. All work with the network
is done by one worker thread, job after job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Generic, TypeVar

from restormer3d.progress import Say

Loaded = TypeVar("Loaded")


class InvokeServer(ThreadingHTTPServer, Generic[Loaded]):
    """An HTTP server that knows the model and the job.

    Parameters
    ----------
    load : function
        Reads the model; called once, at the start.
    job : function
        Does one job with the model and returns what failed: reasons by name.
    port : int
        To listen on, at every address of the machine; 0 takes a free one.
    say, warn : function
        Called with a line of log, and with a line that somebody should see.
    """

    def __init__(
        self, load: Callable[[], Loaded], job: Callable[[Loaded], dict[str, str]], port: int, say: Say, warn: Say
    ) -> None:
        super().__init__(("", port), InvokeHandler)
        self.job, self.say, self.warn = job, say, warn
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="restormer3d")
        self.loaded: Future[Loaded] = self.worker.submit(load)

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self.loaded.done() and self.loaded.exception() is None

    def invoke(self) -> tuple[HTTPStatus, dict[str, object]]:
        """Do one job, after those that came before it, and return the answer."""
        done = self.worker.submit(self._timed_job)
        error = done.exception()
        failures = {"the job": " ".join(str(error).split()) or repr(error)} if error else done.result()
        for name, reason in failures.items():
            self.warn(f"{name} failed: {reason}")
        if failures:
            return HTTPStatus.INTERNAL_SERVER_ERROR, {"failed": failures}
        return HTTPStatus.CREATED, {"failed": {}}

    def _timed_job(self) -> dict[str, str]:
        started = time.monotonic()
        failures = self.job(self.loaded.result())
        self.say(f"the job took {time.monotonic() - started:.0f} s")
        return failures


class InvokeHandler(BaseHTTPRequestHandler):
    """Answers GET /health and POST /invoke."""

    protocol_version = "HTTP/1.1"
    path = ""  # of a request that is none
    server: InvokeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """Answer GET /health: 200 as soon as a job can be done, 503 before."""
        if self.path.split("?")[0].rstrip("/") != "/health":
            self._answer(HTTPStatus.NOT_FOUND, {"error": f"expected GET /health or POST /invoke, got GET {self.path}"})
        elif self.server.is_ready():
            self._answer(HTTPStatus.OK, {"status": "ready"})
        else:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "loading"})

    def do_POST(self) -> None:
        """Answer POST /invoke when the job is done: 201, or 500 with the reasons; the body says nothing we need."""
        if not self._skip_body():
            got = self.headers["Content-Length"]
            self._answer(HTTPStatus.BAD_REQUEST, {"error": f"Content-Length: expected a number of bytes, got {got}"})
        elif self.path.split("?")[0].rstrip("/") != "/invoke":
            self._answer(HTTPStatus.NOT_FOUND, {"error": f"expected GET /health or POST /invoke, got POST {self.path}"})
        else:
            self._answer(*self.server.invoke())

    def log_message(self, format: str, *args: object) -> None:
        """Log to standard output what is not a health check, which comes every few seconds."""
        if not self.path.startswith("/health"):
            self.server.say(f"{self.command} {self.path}: {args[1] if len(args) > 1 else format % args}")

    def _skip_body(self) -> bool:
        """Read the body so that the next request of this connection starts where it ends; False if its end is not told.

        A connection whose next request cannot be found is closed after the answer.
        """
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            return True
        try:
            left = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            left = -1
        if left < 0:
            self.close_connection = True
            return False
        while left > 0 and (piece := self.rfile.read(min(left, 2**16))):
            left -= len(piece)
        return True

    def _answer(self, status: HTTPStatus, content: dict[str, object]) -> None:
        body = json.dumps(content).encode() + b"\n"
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # whoever asked did not wait; the results are there all the same
            self.close_connection = True


def serve(load: Callable[[], Loaded], job: Callable[[Loaded], dict[str, str]], port: int, say: Say, warn: Say) -> int:
    """Serve the invoke protocol until the process is told to stop; the arguments are those of :class:`InvokeServer`.

    Returns
    -------
    int
        1 if the model can't be loaded.
    """
    try:
        server = InvokeServer(load, job, port, say, warn)
    except OSError as error:
        warn(f"can't listen on port {port}: {error}")
        return 1
    say(f"listening on port {server.server_address[1]}")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        error = server.loaded.exception()
        if error is not None:
            warn(f"the model can't be loaded: {' '.join(str(error).split())}")
            return 1
        while True:
            time.sleep(3600)
    finally:
        server.worker.shutdown(wait=False, cancel_futures=True)
        server.shutdown()
