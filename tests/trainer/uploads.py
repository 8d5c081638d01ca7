"""Checkpoints to upload, and what a store has of them."""

import hashlib
import json
import random

from trainer.remote import RemoteCheckpoints

FILES = {
    "__0_0.distcp": random.Random(0).randbytes(100_000),
    "__1_0.distcp": random.Random(1).randbytes(100_001),
    ".metadata": b"where each tensor lies",
    "trainer.json": b"{}",
    "huggingface/config.json": b'{"model_type": "llama"}',
    "huggingface/empty": b"",
}
SMALL = {"__0_0.distcp": b"first share", "__1_0.distcp": b"second share", ".metadata": b"{}"}


def a_checkpoint(folder, step, files=FILES, generation=0):
    checkpoint = folder / f"step-{step:08d}"
    for name, content in files.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    manifest = {"files": {name: entry_of(content) for name, content in files.items()}}
    if generation:  # manifests of before have none
        manifest["generation"] = generation
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint


def entry_of(content):
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def send(checkpoints, checkpoint):
    checkpoints.upload(checkpoint, json.loads((checkpoint / "manifest.json").read_text())["files"])
    checkpoints.commit(checkpoint)


def of_start(generation):
    """Files of the same names and sizes for every start, but with other contents."""
    return {name: bytes([generation]) * len(content) for name, content in SMALL.items()}


def stored_of(name):
    """The start whose files a checkpoint has, all of which are verified."""
    checkpoints = RemoteCheckpoints("double://b/run")
    files = checkpoints.manifest(name).files
    found = {file: checkpoints.read(name, file) for file in files}
    assert {file: entry_of(content) for file, content in found.items()} == files
    [start] = {content[0] for content in found.values()}
    return start
