"""The container's command line: arguments in, exit status out.

0: all stacks are denoised; 1: something failed, one line on standard error for each reason; 2: bad arguments;
130: interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal, get_args

from cyclopts import App, CycloptsError

Api = Literal["exec", "invoke"]

API_VARIABLE = "GRAND_CHALLENGE_COMPONENT_API_METHOD"

app = App(
    name="python -m restormer3d.challenge",
    help_format="markdown",
    suppress_keyboard_interrupt=False,  # main() answers it
)


def main() -> None:
    """Run the container's command line and leave with its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as process 1 it would not even be ended by it
    try:
        status = app(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        status = _refuse(error)
    except KeyboardInterrupt:
        warn("interrupted")
        os._exit(130)  # a job of the invoke protocol runs on a thread, which a normal exit would wait for
    sys.exit(status)


@app.default
def challenge(
    *,
    input: Path = Path("/input"),
    output: Path = Path("/output"),
    model: Path = Path("/opt/ml/model"),
    time_limit: float = 50.0,
    api: Api | None = None,
    port: int = 4743,
    iterations: int | None = None,
    config: Path | None = None,
) -> int:
    """Denoise every stack in the platform's input folder into its output folder.

    Parameters
    ----------
    input
        Folder with inputs.json (may be absent) and the stacks; only read.
    output
        Folder that receives a file of each input's name.
    model
        Folder with the weights, *.safetensors; without any, those in the package are used.
    time_limit
        Minutes for a job, all its stacks together: iterations and overlap are reduced to end in time.
    api
        "exec" does one job and ends; "invoke" serves GET /health and POST /invoke. By default what the environment
        variable GRAND_CHALLENGE_COMPONENT_API_METHOD says, else exec.
    port
        Of the invoke protocol.
    iterations
        Noise2Void iterations on each stack, in place of the recipe's 800; 0 takes the weights as they are.
    config
        TOML file with tables [model], [training], [inference].
    """
    method = api or os.environ.get(API_VARIABLE) or "exec"
    if method not in get_args(Api):
        return _refuse(ValueError(f"{API_VARIABLE} must be exec or invoke, got {method!r}"))
    if not 0 <= port < 2**16:
        return _refuse(ValueError(f"--port must be at least 0 and below {2**16}, got {port}"))
    # Imported here: --help answers without torch.
    from restormer3d.challenge.job import load, one_line, run_job
    from restormer3d.challenge.server import serve
    from restormer3d.settings import check_time_limit, settings
    from restormer3d.workflow import FAILURES

    try:
        check_time_limit(time_limit)
        # As from scratch, but with an iteration: whether there are weights that need none is seen when they are loaded.
        settings(weights="none", iterations=iterations or 1, config_file=config)
    except (OSError, ValueError) as error:
        return _refuse(error)
    if method == "invoke":
        return serve(
            lambda: load(model, iterations, config, say, warn),
            lambda loaded: run_job(loaded, input, output, time_limit, time.monotonic(), say, warn),
            port,
            say,
            warn,
        )
    try:
        loaded = load(model, iterations, config, say, warn)
        failures = run_job(loaded, input, output, time_limit, time.monotonic() - _seconds_running(), say, warn)
    except FAILURES as error:
        failures = {"the job": one_line(error)}
    for name, reason in failures.items():
        warn(f"{name} failed: {reason}")
    return 1 if failures else 0


def say(text: str) -> None:
    """Print a line of the job's log; the platform shows standard output as it is."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print a line that somebody should see; the platform marks what comes on standard error as a warning."""
    print(text, file=sys.stderr, flush=True)


def _seconds_running() -> float:
    """Seconds since this process started: the platform's clock ran while torch was imported."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def _refuse(error: Exception) -> int:
    warn(f"bad arguments: {error}")
    return 2


if __name__ == "__main__":
    main()
