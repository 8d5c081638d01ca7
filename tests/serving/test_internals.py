"""What is used of transformers' internals is checked before anything runs."""

from pathlib import Path

import pytest

from core.errors import ConfigError
from serving.engines import internals

ROOT = Path(__file__).parents[2]


class Owner:
    def __init__(self):
        self.set_by_it = 1

    def method(self):
        pass


def test_a_missing_name_is_refused_in_a_line():
    internals.check_names({Owner: ("set_by_it", "method")})
    with pytest.raises(ConfigError, match=r"^transformers=.*Owner\.gone; install ") as refused:
        internals.check_names({Owner: ("method", "gone")})
    assert "\n" not in str(refused.value)


def test_the_known_version_is_the_pinned_one():
    assert f"transformers=={internals.KNOWN}\n" in (ROOT / "constraints.txt").read_text()


def test_only_one_file_uses_the_internals_of_continuous_batching():
    files = [path for path in (ROOT / "serving").rglob("*.py") if path.name != "internals.py"]
    assert len(files) > 50
    for path in files:
        assert "generation.continuous_batching" not in path.read_text(), path
