"""Has the C library give freed tensors' memory back to the system, so that a run's size is that of what lives."""

import ctypes

_MMAP_THRESHOLD = -3  # of <malloc.h>
_LARGE = 1 << 20


def return_freed_tensors_() -> bool:
    """From here on in this process: what is freed of 1 MiB or more is the system's again at once (glibc).

    By default glibc moves that bound up to 32 MiB as larger pieces are freed, and keeps what is below it in a heap with
    holes: measured with 12 MB weights, a run then took 40 % more memory than lived, and more with every block.

    Returns: whether the C library took it; others (musl, macOS, Windows) do not have the setting.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE))
    except (OSError, AttributeError, TypeError):  # Windows has no handle to the program itself
        return False
