"""What happens to a large freed tensor's pages, in a process of its own: pytest's heap has a history."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")

SCRIPT = """
import resource, sys
import torch
from elastic_sparsity import allocator

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pages_cleared_again():
    for _ in range(2):  # 96 MiB in pieces of 4, all given back at once
        before = faults()
        pieces = [torch.ones(1 << 20) for _ in range(24)]
        del pieces
    return faults() - before

torch.set_num_threads(1)
with allocator.usual_allocator_after():
    assert getattr(allocator, sys.argv[1])()
    inside = pages_cleared_again()
print(inside, pages_cleared_again())
"""


@pytest.mark.parametrize(("function", "share"), [("keep_freed_tensors_", 0.0), ("return_freed_tensors_", 1.0)])
def test_pages_of_freed_tensors(function, share):
    found = subprocess.run([sys.executable, "-c", SCRIPT, function], capture_output=True, text=True, check=True)
    inside, after = map(int, found.stdout.split())
    pages = 24 * (4 << 20) // 4096
    assert inside == pytest.approx(share * pages, abs=0.1 * pages)
    assert after < 0.9 * pages  # by glibc's own rule some stay; how many is chance
