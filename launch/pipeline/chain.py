"""Runs stages one after another on this machine, each once, and verifies what they hand over.

`pipeline.json` in the run directory records the finished stages: their command, and digests of
their input and output. A stage runs again if its command or input has changed. A stage that was
stopped (33) runs again too, and resumes by itself.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import layout
from core.errors import ConfigError, DamagedError, ExitCode, SpotforgeError
from core.folder import manifest_of, write_file
from core.process.child import Child, exit_code
from core.process.python import environment
from core.process.signals import exit_at_once, passed_on
from launch.elastic.journal import say
from launch.pipeline.stages import Stage, stages_of
from launch.settings import Settings

Digests = dict[str, str]  # SHA-256 of each file, by its path in the folder
_RECORD = ("name", "arguments", "input", "path", "output", "time")  # fields of a finished stage


class Chain:
    """The stages of one run.

    Args:
        stages: Stages in running order.
        state: File that records the finished stages; the first stage creates its folder.
    """

    def __init__(self, stages: Sequence[Stage], state: Path) -> None:
        self._stages, self._path = stages, state
        self._done = _read(state)
        self._manifests: dict[Path, Digests] = {}  # cached: hashing a large model takes minutes

    def run(self, only: str | None = None) -> int:
        """Runs the stages that are not done.

        Args:
            only: Name of the only stage to run; None: all stages.

        Returns:
            0 if all stages are done, else the exit code of the first stage that is not.

        Raises:
            DamagedError: The output of a stage has changed since it was written.
            ConfigError: The input of a stage does not exist.
            SpotforgeError: A stage ended with exit code 0 but wrote no output.
        """
        exit_at_once()
        for stage in self._stages:
            if only not in (None, stage.name):
                continue
            if self._is_done(stage):
                say("pipeline", f"{stage.name} is done")
                continue
            self._check_input(stage)
            code, told = self._run(stage)
            if code == ExitCode.START_AGAIN:
                say("pipeline", f"{stage.name} was stopped; the same command goes on from there")
            elif code != ExitCode.FINISHED:
                say("pipeline", f"{stage.name} ended with exit code {code}; nothing after it runs")
            if code != ExitCode.FINISHED:
                return code
            self._note(stage)
            if told and stage is not self._stages[-1]:
                # The stage finished although it was told to stop: the next one must not begin.
                return ExitCode.START_AGAIN
        return ExitCode.FINISHED

    def record(self, name: str) -> None:
        """Records that a stage is done which was run by another program.

        Args:
            name: Name of the stage.

        Raises:
            SpotforgeError: The stage has written no output.
        """
        for stage in self._stages:
            if stage.name == name:
                self._note(stage)

    def _is_done(self, stage: Stage) -> bool:
        record = self._done.get(stage.name)
        if record is None or record["arguments"] != list(stage.arguments):
            return False
        if stage.input is not None and record["input"] != self._manifest(stage.input):
            # Another run of the stage before is fine; files that changed without it are refused.
            self._check_input(stage)
            return False
        if stage.output is None:
            return True
        if not stage.output.exists():
            return False
        self._refuse_change(stage.name, stage.output, record["output"])
        return True

    def _check_input(self, stage: Stage) -> None:
        """Checks that an input exists and is unchanged since its stage wrote it."""
        if stage.input is None:
            return
        if not stage.input.exists():
            rule = f"{stage.input} does not exist"
            raise ConfigError("launch.stages", stage.name, rule, "run the stage before it first")
        # The record of the stage that wrote the input, which may be of an earlier pipeline.
        for record in self._done.values():
            if record["path"] == self._relative(stage.input):
                self._refuse_change(record["name"], stage.input, record["output"])

    def _refuse_change(self, name: str, path: Path, was: Digests) -> None:
        what = _first_difference(was, self._manifest(path))
        if what is not None:
            raise DamagedError(
                "launch.stages",
                name,
                f"{path}: {what} since",
                f"restore it, or remove {path} to have {name} run again",
            )

    def _run(self, stage: Stage) -> tuple[int, bool]:
        say("pipeline", f"{stage.name} begins")
        with passed_on(lambda: Child(stage.command, environment())) as (child, signals):
            code = child.wait()
        assert code is not None
        return exit_code(code), bool(signals)

    def _note(self, stage: Stage) -> None:
        """Records that a stage is done."""
        if stage.output is not None:
            self._manifests.pop(stage.output, None)  # the cached digests are of the files before
            if not stage.output.exists():
                raise SpotforgeError(f"{stage.name} ended without writing {stage.output}")
        self._done[stage.name] = {
            "name": stage.name,
            "arguments": list(stage.arguments),
            "input": self._manifest(stage.input) if stage.input is not None else {},
            "path": self._relative(stage.output) if stage.output is not None else None,
            "output": self._manifest(stage.output) if stage.output is not None else {},
            "time": time.time(),
        }
        write_file(self._path, json.dumps({"format_version": 1, "stages": self._done}, indent=1))

    def _relative(self, path: Path) -> str:
        """Returns a path relative to the run directory, which may be mounted elsewhere later."""
        return os.path.relpath(path, self._path.parent)

    def _manifest(self, path: Path) -> Digests:
        if path not in self._manifests:
            files = manifest_of(path)
            self._manifests[path] = {name: entry["sha256"] for name, entry in files.items()}
        return self._manifests[path]


def chain_of(settings: Settings, config_dir: Path | None = None) -> Chain:
    """Returns the stages of a job, with what its run directory records of them.

    Args:
        settings: Settings of the job.
        config_dir: Folder for `--config-dir` of the trainer.

    Raises:
        ConfigError: See `stages_of`.
    """
    stages = stages_of(settings, config_dir)
    return Chain(stages, settings.trainer.run_dir / layout.PIPELINE)


def _first_difference(was: Digests, now: Digests) -> str | None:
    """Returns the first file that was changed, removed or added, and which of these it was."""
    for name in sorted(was.keys() | now.keys()):
        if name not in now:
            return f"{name} is gone"
        if name not in was:
            return f"{name} was added"
        if was[name] != now[name]:
            return f"{name} was changed"
    return None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {name: {key: record[key] for key in _RECORD} for name, record in stages.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        fix = "remove it: stages that are done end at once when they are run again"
        raise DamagedError("pipeline", path, "cannot be read", fix) from e
