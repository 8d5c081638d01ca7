import json
import platform
import subprocess

from core.version import checkout
from monitoring.environment import _cpu_model, describe_environment

_UNAME = platform.uname()


def test_describes_code_software_and_hardware():
    environment = describe_environment()
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["torch"]
    assert environment["cpu"]["num_cores"] >= environment["cpu"]["num_cores_usable"] >= 1
    assert environment["memory_bytes"] > 2**28
    assert isinstance(environment["gpus"], list)


def test_names_neither_host_nor_user(monkeypatch):
    monkeypatch.setattr(platform, "uname", lambda: _UNAME._replace(node="secret-host"))
    monkeypatch.setenv("USER", "secret-user")
    monkeypatch.setenv("HOME", "/home/secret-user")
    assert "secret" not in json.dumps(describe_environment())


def test_commit_and_dirty_flag(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    root = tmp_path.resolve()
    assert checkout(root) is None
    git("init")
    assert checkout(root) is None  # nothing committed yet
    git("commit", "--allow-empty", "-m", "first")
    clean = checkout(root)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "new").touch()
    assert checkout(root)["dirty"] is True


def test_a_package_inside_another_repository_has_no_commit(tmp_path):
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    (tmp_path / "site-packages").mkdir()
    assert checkout((tmp_path / "site-packages").resolve()) is None


def test_cpu_without_a_name(tmp_path):
    assert _cpu_model(tmp_path / "absent") == platform.machine()
