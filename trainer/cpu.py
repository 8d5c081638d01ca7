"""Settings of the C library's memory allocator for PyTorch on a CPU."""

import ctypes
import sys

# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next step.

    A step allocates and frees large temporaries. By default glibc returns each to the kernel, and
    the next step pays for the page faults again, about an eighth of a small model's step time. Does
    nothing if the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Makes malloc return freed blocks of 64 KiB and more to the kernel at once.

    If a model is loaded part by part, the memory that glibc keeps between parts adds up, because
    glibc raises its threshold for mapped blocks over time. Does nothing if the C library is not
    glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
