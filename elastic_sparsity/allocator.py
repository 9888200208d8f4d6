"""Has the C library give freed tensors' memory back to the system, so that a run's size is that of what lives."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # of <malloc.h>
_TIGHT, _USUAL = 1 << 20, 32 << 20  # the second is where glibc's own rule ends, once large tensors were freed


def return_freed_tensors_(wanted: bool = True) -> bool:
    """From here on in this process: what is freed of 1 MiB or more is the system's again at once (glibc).

    By default glibc moves that bound up to 32 MiB as larger pieces are freed, and keeps what is below it in a heap with
    holes: measured with weights of 12 MB, a run then takes 40 % more memory than lives, and the more the longer it
    runs. The price, for tensors between the two bounds: the system clears every new page (measured: a third more CPU
    time). Weights above 32 MiB, of a model of width 4096 say, come and go like this in any case.

    Returns: whether the C library took it; others (musl, macOS, Windows) do not have the setting.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _TIGHT if wanted else _USUAL))
    except (OSError, AttributeError, TypeError):  # Windows has no handle to the program itself
        return False


@contextmanager
def usual_allocator_after() -> Iterator[None]:
    """Undoes `return_freed_tensors_` at the end of the block."""
    try:
        yield
    finally:
        return_freed_tensors_(False)
