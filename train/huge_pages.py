"""Huge memory pages for programs that compute on a CPU."""

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_in_huge_pages() -> None:
    """Restarts this program with its memory in huge pages, if the kernel gives them on request only.

    A step allocates and frees hundreds of megabytes. With pages of 4 KB it waits for the kernel to provide each
    page and for addresses to be looked up. Under Linux, glibc requests huge pages if an environment variable says
    so when the process starts. Call this before any other import.

    The program goes on unchanged if the kernel gives huge pages to all processes or to none, or if the variable is
    set: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not sys.executable or not _are_on_request():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _are_on_request() -> bool:
    return _KERNEL.exists() and "[madvise]" in _KERNEL.read_text()
