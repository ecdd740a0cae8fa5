"""How the kernels are compiled, and when a compiled kernel may be taken from the cache of an earlier process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba

_FAST = {"contract", "reassoc", "nsz"}  # what fast-math would also allow, to ignore NaN, is wrong here


def compiled(function: Callable[..., Any]) -> Any:
    """Compile for one thread."""
    return _jit(function, parallel=False)


def parallel(function: Callable[..., Any]) -> Any:
    """Compile with `numba.prange` running on all threads."""
    return _jit(function, parallel=True)


def _jit(function: Callable[..., Any], *, parallel: bool) -> Any:
    function.__qualname__ += f"_{_source_digest()}"
    try:
        return numba.njit(fastmath=_FAST, nogil=True, parallel=parallel, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(fastmath=_FAST, nogil=True, parallel=parallel)(function)


@lru_cache(maxsize=1)
def _source_digest() -> str:
    """Return a digest of this folder's code: it becomes part of the names of cached kernels.

    Numba looks at the age of the file of a kernel only, not at the files of what the kernel calls.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
