"""An auditor of checkpoint folders that shares no code with the trainer, and ways to damage one."""

import hashlib
import json
import re
import shutil

_NAME = re.compile(r"step-(\d{8})")


def steps(folder):
    """{step: path} of every folder that claims to be a checkpoint."""
    if not folder.is_dir():
        return {}
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def uploads(store):
    """{step: path} of what is committed in a store: the newest generation with a manifest."""
    newest = {}
    for step, path in steps(store).items():
        found = [p for p in path.glob("generation-*") if (p / "manifest.json").exists()]
        if found:
            newest[step] = max(found, key=lambda p: int(p.name.removeprefix("generation-")))
    return newest


def fault(checkpoint):
    """What is wrong with a checkpoint; None if every byte is as it was written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        trainer = json.loads((checkpoint / "trainer.json").read_bytes())
    except (OSError, ValueError, KeyError) as e:
        return f"manifest.json or trainer.json: {e!r}"
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    if files != {*manifest, "manifest.json"}:
        return f"files that are not in the manifest, or not there: {files ^ {*manifest}}"
    for name, entry in manifest.items():
        content = (checkpoint / name).read_bytes()
        if len(content) != entry["size_bytes"]:
            return f"{name} has {len(content)} of {entry['size_bytes']} bytes"
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return f"{name} is altered"
    if f"step-{trainer['step']:08d}" not in (checkpoint.name, checkpoint.parent.name):
        return f"holds step {trainer['step']}"
    return None


def valid_steps(folder):
    """Steps of the checkpoints that are complete, ascending."""
    return sorted(step for step, path in steps(folder).items() if fault(path) is None)


def truncate(checkpoint, rng):
    """Cuts the end of a shard off."""
    shard = _shard(checkpoint, rng)
    content = shard.read_bytes()
    shard.write_bytes(content[: rng.randrange(len(content))])


def flip_bit(checkpoint, rng):
    """Flips one bit of a shard."""
    shard = _shard(checkpoint, rng)
    content = bytearray(shard.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)


def remove_manifest(checkpoint, rng):
    """Removes the list of files."""
    (checkpoint / "manifest.json").unlink()


def tear_manifest(checkpoint, rng):
    """Leaves the first half of the list of files."""
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])


def remove_file(checkpoint, rng):
    """Removes any file but the manifest."""
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    rng.choice(files).unlink()


def leave_staging(checkpoint, rng):
    """Leaves a later one that is complete but for its name: it was never committed."""
    later = int(checkpoint.name.removeprefix("step-")) + 1
    staging = checkpoint.with_name(f".staging-step-{later:08d}")
    shutil.copytree(checkpoint, staging, dirs_exist_ok=True)


DAMAGE = {
    "truncated shard": truncate,
    "flipped bit": flip_bit,
    "missing manifest": remove_manifest,
    "torn manifest": tear_manifest,
    "missing file": remove_file,
    "uncommitted staging": leave_staging,
}


def _shard(checkpoint, rng):
    return rng.choice(sorted(checkpoint.glob("*.distcp")))
