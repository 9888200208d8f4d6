"""The counts of all bad inputs. Its name comes last, so that it runs after the other files."""

from pathlib import Path

import pytest

pytest_plugins = ("hostile_fixtures",)

AT_LEAST = 5000


def test_the_total(ledger, record_property):
    record_property("bad inputs", ledger.table())
    others = {path.name for path in Path(__file__).parent.glob("test_hostile*.py")} - {Path(__file__).name}
    if ledger.files != others:
        pytest.skip("counts only after all of tests/test_hostile*.py")
    assert ledger.total() >= AT_LEAST
    assert not ledger.problems
