"""Settings that cannot be, of the gateway and of a worker."""

import subprocess
import sys

import pytest

from core.errors import ConfigError
from core.settings.rules import check_settings
from serving.batches.database import Database
from serving.config import BatchesConfig, ServingConfig
from tests.serving.batches.small import ROOT

REDIS = "redis://127.0.0.1/0"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"broker": REDIS}, "batches.broker"),
        ({"dir": "b", "broker": "127.0.0.1:6379"}, "batches.broker"),
        ({"dir": "b", "broker": REDIS, "concurrency": 4}, "batches.concurrency"),
        ({"dir": "b", "broker": REDIS, "lease_s": 4.0}, "batches.lease_s"),
        ({"dir": "b", "max_file_mb": 0}, "batches.max_file_mb"),
    ],
)
def test_settings_of_the_gateway(settings, key):
    with pytest.raises(ConfigError) as error:
        check_settings(ServingConfig(artifact="a", batches=BatchesConfig(**settings)))
    assert error.value.key == key


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "dir=???: has to be given"),
        (["dir=b", f"broker={REDIS}", "gateway=127.0.0.1:8000"], "gateway=127.0.0.1:8000: is no"),
        (["dir=b", f"broker={REDIS}", "gateway=http://x", "lease_s=0"], "lease_s=0.0: must be"),
        (["dir=b", f"broker={REDIS}", "gateway=http://x"], "dir=b: holds no batches"),
        (["dri=b"], "dri"),
    ],
)
def test_settings_of_a_worker(words, told):
    command = [sys.executable, "-m", "serving.batches.worker", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="batches.dir"):
        Database(tmp_path / "file")
