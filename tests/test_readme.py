"""README's "A user's day" runs as it stands, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_a_users_day(tmp_path):
    day = README.read_text(encoding="utf-8").partition("## A user's day")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", day, re.S | re.M)
    assert [language for language, _ in blocks] == ["sh", "python"]
    commands = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    for (_, text), start in zip(blocks, (["bash", "-ec"], [sys.executable, "-c"]), strict=True):
        done = subprocess.run(
            [*start, text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for made in ("my-elastic", "fast", "device", "my-2of4", "my-packed", "my-adapters"):
        assert any((tmp_path / made).iterdir())
