"""The trainer starts in huge pages where the kernel wants to be asked for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train import huge_pages

PROGRAM = """
import os, sys
from train import huge_pages
huge_pages._are_on_request = lambda: {asked}
huge_pages.restart_in_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("asked", "tunables", "expected"),
    [
        (True, None, "glibc.malloc.hugetlb=1"),
        (True, "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        (True, "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        (False, None, "None"),
    ],
)
def test_starts_once_more_with_the_same_arguments(asked, tunables, expected, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM.format(asked=asked))
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": tunables} if tunables else {}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)  # `train` is not installed
    command = [sys.executable, "-X", "utf8", file, "--losses", "dice+2*ace", "two words"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected} --losses dice+2*ace two words\n"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("always [madvise] never", True),
        ("[always] madvise never", False),
        ("always madvise [never]", False),
        (None, False),
    ],
)
def test_asks_where_the_kernel_gives_them_on_request_only(kernel, expected, tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    if kernel:
        file.write_text(kernel)
    monkeypatch.setattr(huge_pages, "_KERNEL", file)
    assert huge_pages._are_on_request() is expected


@pytest.mark.parametrize("module", ["train", "benchmarks"])
def test_both_command_lines_do_so_before_they_import_what_is_slow(module):
    code = (
        "import runpy, sys; from train import huge_pages; "
        "huge_pages.restart_in_huge_pages = lambda: sys.exit('jax' in sys.modules); "
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
