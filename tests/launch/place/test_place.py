"""A plan becomes a SkyPilot task, and what cannot be placed is refused before anything starts."""

import datetime
import json
import os
import shlex
import stat

import pytest
import yaml

from core.errors import ConfigError
from launch.__main__ import main
from launch.catalog.catalog import Catalog
from launch.place.cli import place_of
from launch.place.place import job_of
from launch.place.skypilot import documents
from launch.plan.planner import make_plan
from launch.settings import compose_settings
from tests.launch.offers import offer
from tests.words import last_of_each

JOB = (
    "model=llama_8b",
    "model.vocab_size=128256",
    "parallel=fsdp",
    "precision=bf16",
    "stop.steps=1000",
    "run.dir=runs/My_Run",
)
SPOT = (
    offer(region="ap-south-1", zone="ap-south-1a", usd_per_h=9.0, is_spot=True),
    offer(cloud="gcp", region="us-east4", usd_per_h=12.0, is_spot=True),
    offer(usd_per_h=40.0),
    offer(cloud="jarvis-labs", region="", usd_per_h=1.0),
)

PRICES = "SPOTFORGE_PRICES"


def placed(*words, offers=SPOT):
    settings = compose_settings(last_of_each([*JOB, "launch.nodes=[1]", *words]))
    catalog = Catalog("test", datetime.date(2026, 5, 24), 0, "sha256:0", tuple(offers))
    plan = make_plan(settings, catalog)
    return job_of(plan, place_of(settings.launch))


def render(job):
    return place_of(job.launch).render(job)


def document(job):
    [task] = documents(job)
    return task


def guard_words(job):
    """Those of the guard, and the command that it guards."""
    [line] = [line for line in document(job)["run"].splitlines() if "launch guard" in line]
    words = shlex.split(line)
    end = words.index("--")
    return words[:end], words[end + 1 :]


def test_places_are_in_our_order_and_only_those_that_skypilot_knows():
    resources = document(placed("launch.bucket=s3://mine"))["resources"]
    assert [(r["infra"], r["use_spot"]) for r in resources["ordered"]] == [
        ("aws/ap-south-1/ap-south-1a", True),
        ("gcp/us-east4", True),
        ("aws/us-east-1", False),
    ]
    assert {r["accelerators"] for r in resources["ordered"]} == {"H100:8"}
    assert resources["job_recovery"]["recover_on_exit_codes"] == [33]
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0


def test_zones_that_are_known_by_their_id_only_are_left_to_skypilot():
    zones = [f"aps1-az{n}" for n in (1, 2)]
    offers = [offer(region="ap-south-1", zone=zone, is_spot=True) for zone in zones]
    resources = document(placed("launch.bucket=s3://mine", offers=offers))["resources"]
    assert [r["infra"] for r in resources["ordered"]] == ["aws/ap-south-1"]
    prices = json.loads(document(placed("launch.bucket=s3://mine", offers=offers))["envs"][PRICES])
    assert {price["zone"] for price in prices} == {""}


def test_the_job_is_guarded_keeps_its_checkpoints_and_names_secrets_only(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    words = ("launch.budget_usd=2000", "launch.deadline=90h", "launch.secrets=[WANDB_API_KEY]")
    job = placed("launch.bucket=s3://mine", *words)
    task, text = document(job), render(job)
    assert task["secrets"] == {"WANDB_API_KEY": None} and "very-secret" not in text
    assert task["file_mounts"] == {
        "/spotforge": {"name": "mine", "store": "s3", "mode": "MOUNT_CACHED"}
    }
    guard, command = guard_words(job)
    assert guard[guard.index("--budget-usd") + 1] == "2000"
    assert guard[guard.index("--deadline-h") + 1] == "90"
    assert guard[guard.index("--ledger") + 1] == "/spotforge/my-run/ledger"
    assert command[:4] == ["python", "-m", "launch", "supervise"]
    assert "checkpoint.upload=file:///spotforge/my-run/checkpoints" in command
    assert command[-1] == "run.dir=runs/My_Run"
    prices = json.loads(task["envs"][PRICES])
    assert [(p["usd_per_h"], p["gpus_per_node"]) for p in prices] == [(9, 8), (12, 8), (40, 8)]
    assert yaml.safe_load(text) == task


def test_prices_have_skypilots_names_of_clouds():
    job = placed(offers=[offer(cloud="digitalocean", region="tor1")])
    [price] = json.loads(document(job)["envs"][PRICES])
    assert price["cloud"] == "do"  # as SKYPILOT_CLUSTER_INFO has it, in any case


def test_the_trainer_takes_the_command_of_the_task():
    _, command = guard_words(placed("launch.bucket=gs://mine"))
    words = command[command.index("trainer") + 1 :]
    assert str(compose_settings(words).trainer.checkpoint.upload).startswith("file:///spotforge/")


def test_several_nodes_meet_at_the_first():
    words = ("launch.nodes=[2]", "launch.bucket=s3://mine", "launch.shared_dir=/shared")
    job = placed(*words)
    assert document(job)["num_nodes"] == 2
    _, command = guard_words(job)
    assert command[4:8] == ["--listen", "29400", "--nodes", "2"]
    trainer = command[command.index("--") + 1 :]
    [join] = [line for line in document(job)["run"].splitlines() if "launch join" in line]
    assert shlex.join(trainer) in join  # a machine joins with the same words only
    assert trainer[-1] == "run.dir=/shared/my-run"


@pytest.mark.parametrize(
    ("words", "run_dir", "cost"),
    [
        (("launch.bucket=s3://mine",), "runs/My_Run", "the steps since the last upload"),
        (("launch.spot=never",), "runs/My_Run", "the whole run"),
        (
            ("launch.bucket=s3://mine", "launch.shared_dir=/shared"),
            "/shared/my-run",
            "the steps since the last checkpoint",
        ),
    ],
)
def test_nodes_need_no_disk_that_they_share_and_the_file_says_what_a_loss_costs(
    words, run_dir, cost
):
    job = placed(*words, "launch.nodes=[2]")
    _, command = guard_words(job)
    assert command[-1] == f"run.dir={run_dir}"
    [line] = [line for line in render(job).splitlines() if line.startswith("# ") and cost in line]
    assert "costs" in line
    alone = render(placed(*words, "launch.nodes=[1]"))
    assert not any(line.startswith("# ") and "costs" in line for line in alone.splitlines())


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((), "launch.bucket"),
        (("launch.bucket=mine",), "launch.bucket"),
        (("launch.bucket=s3://mine", "launch.name=Not_One"), "launch.name"),
        (("launch.bucket=s3://mine", "launch.stages=[compress,train]"), "launch.stages"),
        (("launch.skypilot.workdir=/no/such/folder",), "launch.skypilot.workdir"),
        (("launch.clouds=[jarvis-labs]",), "launch.clouds"),
    ],
)
def test_what_cannot_be_placed_is_refused(words, key):
    with pytest.raises(ConfigError) as error:
        render(placed(*words))
    assert str(error.value).startswith(f"{key}=") and error.value.exit_code == 2


def test_stages_are_tasks_one_after_another(monkeypatch):
    monkeypatch.setattr("launch.pipeline.stages._is_there", lambda package: True)
    words = ("launch.nodes=[2]", "launch.bucket=s3://mine", "launch.shared_dir=/shared")
    job = placed("launch.stages=[train,compress,release]", *words)
    name, train, compress, release = list(yaml.safe_load_all(render(job)))
    assert name == {"name": "my-run"}
    assert [t["name"] for t in (train, compress)] == ["my-run-train", "my-run-compress"]
    assert [t["num_nodes"] for t in (train, compress, release)] == [2, 1, 1]
    assert "launch pipeline --record train" in train["run"]
    assert "launch pipeline --only compress" in compress["run"]
    [line] = [line for line in release["run"].splitlines() if "guard" in line]
    stage = shlex.split(line)
    assert stage[-1] == "launch.stages=[train,compress,release]"
    assert "run.dir=/shared/my-run" in stage and "cp -r" not in release["run"]

    job = placed("launch.stages=[train,compress]", "launch.bucket=s3://mine")
    _, train, compress = documents(job)
    assert "cp -r runs/My_Run/. /spotforge/my-run/run" in train["run"]
    assert compress["run"].startswith(
        "mkdir -p runs/My_Run && cp -r /spotforge/my-run/run/. runs/My_Run || exit 1\n"
    )


def stand_in_sky(folder, checked='{"default": {"AWS": ["compute"]}}'):
    """A `sky` that writes down how it was called."""
    path = folder / "sky"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\n'
        f"[ \"$1\" = check ] && echo started && echo '{checked}' && exit 0\n"
        f'[ "$2" = launch ] && for last in "$@"; do :; done && cp "$last" {folder}/task.yaml\n'
        f'[ "$2" = launch ] && echo "$SPOTFORGE_TOKEN" >> {folder}/tokens\n'
        "exit 0\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"launch.sky={path}"


def start(job):
    return place_of(job.launch).start(job, render(job))


def test_up_hands_the_task_to_sky_with_the_names_of_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "very-secret")
    sky = stand_in_sky(tmp_path)
    job = placed("launch.bucket=s3://mine", "launch.secrets=[KEY]", sky)
    assert start(job) == 0
    check, launch = (tmp_path / "calls").read_text().splitlines()
    assert check == "check -o json aws gcp"
    assert launch.startswith("jobs launch --yes --detach-run --name my-run --secret KEY ")
    assert "very-secret" not in launch
    assert yaml.safe_load((tmp_path / "task.yaml").read_text()) == document(job)


def test_nodes_get_a_token_to_join_by(tmp_path, monkeypatch):
    """It is made for the job, and is in no file."""
    monkeypatch.delenv("SPOTFORGE_TOKEN", raising=False)
    sky = stand_in_sky(tmp_path)
    job = placed("launch.bucket=s3://mine", "launch.nodes=[2]", "launch.shared_dir=/shared", sky)
    assert start(job) == 0
    assert " --secret SPOTFORGE_TOKEN " in (tmp_path / "calls").read_text()
    tokens = (tmp_path / "tokens").read_text().split()
    assert len(tokens) == 1 and len(tokens[0]) >= 32 and "SPOTFORGE_TOKEN" not in os.environ
    task = (tmp_path / "task.yaml").read_text()
    assert tokens[0] not in task
    assert yaml.safe_load(task)["secrets"] == {"SPOTFORGE_TOKEN": None}
    monkeypatch.setenv("SPOTFORGE_TOKEN", "of the user's own")
    assert start(job) == 0
    assert (tmp_path / "tokens").read_text().splitlines()[1] == "of the user's own"


def test_without_credentials_or_a_secret_nothing_is_launched(tmp_path, monkeypatch):
    for checked in ('{"default": {}}', '{"default": {"AWS": ["storage"]}}', "Error"):
        sky = stand_in_sky(tmp_path, checked)
        with pytest.raises(ConfigError, match="no credentials"):
            start(placed("launch.bucket=s3://mine", sky))
    monkeypatch.delenv("KEY", raising=False)
    with pytest.raises(ConfigError, match="launch.secrets=KEY"):
        start(placed("launch.bucket=s3://mine", "launch.secrets=[KEY]", sky))
    assert "launch" not in (tmp_path / "calls").read_text()


def test_no_sky_is_said_in_one_line(capsys):
    assert main(["status", "launch.sky=no-such-sky"]) == 2
    assert "skypilot" in capsys.readouterr().err


def test_on_this_machine_a_job_is_a_chain_of_its_stages(capsys):
    words = ["run.dir=runs/mine", "stop.steps=7", "launch.target=local"]
    assert main(["render", *words]) == 0
    assert shlex.split(capsys.readouterr().out) == ["python", "-m", "launch", "pipeline", *words]
    # No export is there yet: `up` has tried to run the stages here.
    assert main(["up", *words, "launch.stages=[compress]"]) == 2
    assert capsys.readouterr().err.startswith("launch.stages=[compress]: ")
    assert main(["up", *words, "launch.budget_usd=3"]) == 2
    assert capsys.readouterr().err.startswith("launch.budget_usd=3.0: ")
    for verb in (["status"], ["logs", "mine"], ["down", "mine"]):
        assert main([*verb, "launch.target=local"]) == 2
        assert capsys.readouterr().err.startswith("launch.target=local: ")
