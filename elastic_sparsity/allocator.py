"""What the C library (glibc) does with freed tensors' memory: a run's size against its speed."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_TIGHT, _USUAL = 1 << 20, 32 << 20  # the second is where glibc's own rule ends, once large tensors were freed
_USUAL_TRIM, _NO_TRIM = 2 * _USUAL, 2**31 - 1  # the first by the same rule


def return_freed_tensors_() -> bool:
    """From here on in this process: what is freed of 1 MiB or more is the system's again at once.

    By default glibc moves that bound up to 32 MiB as larger pieces are freed, and keeps what is below it in a heap with
    holes: measured with weights of 12 MB, a run then takes 40 % more memory than lives, and the more the longer it
    runs. The price, for tensors between the two bounds: the system clears every new page (measured: a third more CPU
    time). Weights above 32 MiB, of a model of width 4096 say, come and go like this in any case.

    Returns: whether the C library took it; others (musl, macOS, Windows) do not have the setting.
    """
    return _set(_MMAP_THRESHOLD, _TIGHT)


def keep_freed_tensors_() -> bool:
    """From here on in this process: the heap keeps its freed end for the next tensors.

    By default glibc gives it back above 64 MiB, so a training step clears the pages of its gradients anew (measured:
    4 % of a step; the run's peak is 4.57 GB with it and without).

    Returns: as `return_freed_tensors_`.
    """
    # Setting one bound ends glibc's own rule for the other.
    return _set(_MMAP_THRESHOLD, _USUAL) and _set(_TRIM_THRESHOLD, _NO_TRIM)


@contextmanager
def usual_allocator_after() -> Iterator[None]:
    """Undoes either at the end of the block."""
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _USUAL)
        _set(_TRIM_THRESHOLD, _USUAL_TRIM)


def _set(parameter: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (OSError, AttributeError, TypeError):  # Windows has no handle to the program itself
        return False
