"""The peak memory of a process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_resident_bytes(*, of_children: bool = False) -> float:
    """Largest resident set so far, in bytes: of this process, or of the largest child that has ended.

    Linux starts `ru_maxrss` of a new process at its parent's, so the process's own high-water mark is preferred.
    """
    status = Path("/proc/self/status")
    if not of_children and status.exists():
        return 1024 * float(status.read_text().split("VmHWM:")[1].split()[0])
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
