"""The NEON path, compiled for 64-bit Arm and run in an emulator, where both are installed.

apt-get install qemu-user g++-aarch64-linux-gnu
"""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "elastic_sparsity" / "kernels"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-static"]


def check(compiler, flags, sources, run, tmp_path):
    binary = tmp_path / "kernels_check"
    files = [str(KERNELS / name) for name in ("api.cpp", "training_api.cpp", "path_portable.cpp", *sources)]
    command = [compiler, *FLAGS, *flags, str(TESTS / "kernels_check.cpp"), *files, "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([*run, str(binary)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def test_neon_in_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    assert "neon: 400 matrices" in check(compiler, ["-DES_NEON"], ["path_neon.cpp"], [emulator], tmp_path)


def test_a_wrong_path_is_found(tmp_path):
    """The same check with a broken table must fail, or it checks nothing."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    broken = tmp_path / "path_neon.cpp"
    source = (KERNELS / "path_neon.cpp").read_text().replace("values += count_bits(byte);", "values += 1;")
    broken.write_text(source)
    with pytest.raises(AssertionError, match="neon: a product differs"):
        check(compiler, ["-DES_NEON", f"-I{KERNELS}"], [str(broken)], [emulator], tmp_path)
