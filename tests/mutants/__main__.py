"""Breaks the code in 30 places, one at a time, and shows which test catches each fault.

    python -m tests.mutants                 all, 15 to 30 minutes; writes results.json
    python -m tests.mutants 11 20           these; no results are written of others
    python -m tests.mutants --before        the same faults before the tests were made cheap

A fault is a patch beside this file. cosmic-ray 8.7.0 made it, with its operators for arithmetic,
comparisons, numbers, conditions, loops and exceptions, at places that `random.Random("18/GROUP")`
shuffled: 10 in parallel/, 5 each in order.py, checkpointer.py, launch/budget/ and admission.py, one
in a function. `before/` has the same edits of the same statements for commit `_BEFORE`, which has
the tests as they were; statements that it does not have were passed over. One fault that changes
nothing was dropped: a machine in its first second is taken to be a second old (machine_age.py).

The tests of a fault are those that a developer of its file runs, the cheap ones first. One that
fails or hangs has caught the fault, if it passes in the unbroken tree. Exit code 1 if a fault that
results.json lists as caught is not. A patch that does not fit any more is to be made again.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"

_BEFORE = "ccbb6ba"
_LIMIT_S = 900  # for the tests of one fault
_TOO_LONG = f"the limit of {_LIMIT_S} s"
_STRATEGIES = [
    *(f"tests/trainer/test_{name}.py" for name in ("optim", "weights", "checkpoint")),
    "tests/parallel/test_parity.py",
    *(f"tests/trainer/test_{name}.py" for name in ("keep_zeros", "unused", "anomaly")),
]
_TESTS = {
    "parallel/config.py": [
        "tests/trainer/test_refusals.py",
        "tests/trainer/test_config.py",
        "tests/parallel/test_parity.py",
    ],
    "parallel/launcher.py": [
        "tests/parallel/test_launcher.py",
        "tests/trainer/test_launching.py",
    ],
    "parallel/world.py": [
        "tests/parallel/test_launcher.py",
        "tests/parallel/test_parity.py",
        "tests/trainer/test_preemption.py",
        "tests/trainer/test_checkpoint.py",
    ],
    "parallel/zero.py": _STRATEGIES,
    "parallel/ddp.py": _STRATEGIES,
    "parallel/fsdp.py": _STRATEGIES,
    "trainer/data/order.py": [
        "tests/trainer/data/test_order.py",
        "tests/trainer/data/test_loader.py",
        "tests/trainer/test_order_of_runs.py",
    ],
    "trainer/checkpointer.py": [
        "tests/trainer/test_checkpointer.py",
        "tests/trainer/test_saving.py",  # its name before
        *(f"tests/trainer/test_{name}.py" for name in ("weights", "checkpoint", "remote")),
        "tests/trainer/test_preemption.py",
    ],
    "launch/budget/": ["tests/launch/budget"],
    "serving/admission.py": [
        "tests/serving/test_admission.py",
        "tests/serving/test_keys.py",
        "tests/serving/test_api.py",
    ],
}


def main() -> int:
    """Tries the faults and writes what caught them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("numbers", metavar="NUMBER", nargs="*", help="faults (default: all)")
    parser.add_argument("--before", action="store_true", help=f"in commit {_BEFORE}")
    options = parser.parse_args()
    when = "before" if options.before else "after"
    patches = [
        patch
        for patch in sorted((HERE / "before" if options.before else HERE).glob("*.patch"))
        if not options.numbers or patch.name.partition("-")[0] in options.numbers
    ]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        original = Path(folder, "original")
        _copy_tree(original, _BEFORE if options.before else None)
        lost, catchers = 0, set()
        for patch in patches:
            tree = Path(folder, patch.stem)
            shutil.copytree(original, tree)
            subprocess.run(["git", "apply", "-C1", patch], cwd=tree, check=True)
            test = _first_failure(tree, _tests(patch, original))
            shutil.rmtree(tree)
            result = results.setdefault(patch.stem, {"before": None, "after": None})
            if test is not None:
                result[when] = test
                catchers.add(test)
            elif result[when] is not None:
                lost += 1
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(f"{patch.stem}: {test or f'not caught; listed is {result[when]}'}", flush=True)
        catchers.discard(_TOO_LONG)
        if catchers and (test := _first_failure(original, sorted(catchers))):
            print(f"{test} catches nothing: it fails in the unbroken tree as well")
            return 1
    for column in ("before", "after"):
        caught = sum(result[column] is not None for result in results.values())
        print(f"{column}: {caught} of {len(results)} caught")
    return 1 if lost else 0


def _copy_tree(folder: Path, commit: str | None) -> None:
    """Copies the files of a commit; without one, those of the working tree."""
    folder.mkdir()
    if commit is not None:
        archive = _git("archive", commit)
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        return
    names = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def _tests(patch: Path, tree: Path) -> list[str]:
    """Returns the tests of the file that a patch breaks."""
    broken = re.search(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)[1]
    broken = broken.replace("trainer/saving.py", "trainer/checkpointer.py")  # its name before
    (tests,) = (tests for place, tests in _TESTS.items() if broken.startswith(place))
    return [test for test in tests if (tree / test).exists()]


def _first_failure(tree: Path, tests: list[str]) -> str | None:
    """Returns the test that fails first; None if all pass."""
    options = ["-q", "-x", "--timeout=300", "-p", "no:cacheprovider"]
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        return _TOO_LONG
    if run.returncode == 0:
        return None
    failures = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    if not failures:
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{said}")
    return failures[0]


if __name__ == "__main__":
    sys.exit(main())
