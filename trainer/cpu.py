"""What PyTorch on a CPU needs of the C library."""

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Lets malloc keep what the last step freed for the next one.

    A step allocates and frees large temporaries; by default glibc returns each to the kernel, and
    the next step pays for the page faults again: about an eighth of a small model's step time. Does
    nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Has malloc return what is freed to the kernel at once, from 64 KiB on.

    Where a model goes through memory a part at a time, what glibc keeps of each in between adds up:
    by itself it maps large blocks less and less often. Does nothing where the C library is not
    glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
