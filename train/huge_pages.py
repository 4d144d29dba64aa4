"""Memory in huge pages, for programs that compute on a CPU."""

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_in_huge_pages() -> None:
    """Starts this program anew with its memory in huge pages, where that has to be asked for.

    A step takes and returns hundreds of megabytes. In pages of 4 KB it waits for the kernel to hand out each of
    them, and for addresses to be looked up. Under Linux, glibc asks for huge ones if an environment variable says
    so when the process starts; nothing can say so later. To be called before anything else is imported.

    Nothing happens where the kernel gives huge pages to all or to nobody, or where the variable has been set: with
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` memory stays as it is.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not sys.executable or not _are_to_be_asked_for():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _are_to_be_asked_for() -> bool:
    return _KERNEL.exists() and "[madvise]" in _KERNEL.read_text()
