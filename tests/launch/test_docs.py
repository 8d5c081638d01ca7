"""What docs/launch.md says a newcomer types works, as long as it costs nothing."""

import datetime
import re
import shlex
from pathlib import Path

import pytest

from launch.__main__ import main

PAGE = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
[EXPERIMENT] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
VARIABLES = {
    "$MINE": re.search(r"`\$MINE` stands for `(.+?)`", PAGE)[1],
    '"$HPC"': re.search(r"^HPC=('.+?')$", PAGE, re.M)[1],
}


def commands(*verbs):
    """Words after `python -m launch` of what the page has of these verbs."""
    found = []
    for line in "\n".join(BLOCKS).replace("\\\n", " ").splitlines():
        for name, value in VARIABLES.items():
            line = line.replace(name, value)
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "launch"] and words[3] in verbs:
            found.append(words[3:])
    return found


@pytest.mark.parametrize(
    "words", commands("plan", "render"), ids=lambda words: " ".join(words)[:50]
)
def test_commands_work_as_they_stand_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPOTFORGE_CACHE", str(tmp_path))
    # the page is not rewritten as its prices grow old
    monkeypatch.setattr("launch.catalog.catalog.today", lambda: datetime.date(2026, 11, 24))
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    assert main(words) == 0, capsys.readouterr().err


def test_there_are_commands():
    assert len(commands("plan")) >= 3 and len(commands("render")) >= 2
