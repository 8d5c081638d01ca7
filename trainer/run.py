"""A training run on one rank, from joining the others to the exported folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from core import layout
from core.errors import ConfigError, ExitCode, Interrupted, OwnDiskError, SpotforgeError, is_full
from parallel.disks import Disks, find_disks
from parallel.launcher import read_place
from parallel.peers import PeerFiles
from parallel.strategy import Strategy
from parallel.world import World, join_world
from trainer.checkpoint import Located, TrainerState, committed, read_state
from trainer.checkpointer import Checkpointer
from trainer.config import TrainerConfig, resolve
from trainer.cpu import keep_freed_memory
from trainer.data.cache import cache_folder
from trainer.data.exchange import (
    SERVED,
    DataExchange,
    Names,
    find_cache_disks,
    recorded_names,
)
from trainer.data.loader import check_samples
from trainer.data.order import OrderRule
from trainer.data.prepare import PreparedData, make_plan
from trainer.data.tokenizer import vocab_size_of
from trainer.dry_run import check_forward
from trainer.exporter import export_checkpoint
from trainer.fake_quant import prepare_fake_quant
from trainer.finder import RESUME, CheckpointFinder
from trainer.heartbeat import Heartbeat
from trainer.logs import restore_logs
from trainer.loop import TrainingLoop
from trainer.memory import check_memory
from trainer.model import (
    Materializer,
    build_meta_model,
    hf_config_of,
    prepare_training,
    set_special_token,
)
from trainer.model_config import ModelConfig, NamedModelConfig, PathModelConfig
from trainer.optim import Decay, decayed_names
from trainer.positions import check_positions
from trainer.process import Process
from trainer.remote import RemoteCheckpoints
from trainer.reporter import Reporter, check_run_dir
from trainer.resume import (
    check_same_model,
    check_same_run,
    data_changed,
    keep_what_was_found,
    load_checkpoint,
    order_of,
    set_newer_aside,
    stored_config,
)
from trainer.run_lock import lock_run
from trainer.same_software import check_same_software
from trainer.settle import leave_unused, settle
from trainer.stopping import StopSignal
from trainer.storage import CHECKPOINTS, Generation, Storage
from trainer.weight_files import find_file


def train(
    config: TrainerConfig, stop: StopSignal, heartbeat: Heartbeat, given: Collection[str] = ()
) -> ExitCode:
    """Joins the other ranks and starts or resumes the run that `config` describes.

    Args:
        config: Settings of the run.
        stop: Flag that signals set.
        heartbeat: Heartbeat of this rank.
        given: Keys that the user set; the others have their defaults.

    Returns:
        FINISHED, or START_AGAIN after a stop signal, with all steps saved.

    Raises:
        SpotforgeError: The configuration, the data or the disk does not allow the run.
    """
    _set_up_process(config)
    place = read_place()
    # One rank per machine polls: all ranks of a machine get the same notice.
    if place is None or place.local_rank == 0:
        stop.watch(config.preemption.build(), config.preemption.poll_s)
    with join_world(stop.requested) as world:
        return train_in(world, config, stop, heartbeat, given)


def train_in(
    world: World,
    config: TrainerConfig,
    stop: StopSignal,
    heartbeat: Heartbeat,
    given: Collection[str] = (),
) -> ExitCode:
    """Runs training on one of the ranks of `world`; see `train`."""
    process = Process(world, stop, heartbeat)
    check_same_software(world)

    # 1. Data: prepared once, by the first rank that gets there
    config, data, begun_before = _prepare_data(config, process, given)

    # 2. The model, on the meta device until its strategy decides where each part goes
    with world.together():
        model = build_meta_model(config.model, vocab_size_of(data.tokenizer))
        _set_special_tokens(config.model, model, data)
        too_long = check_positions(model, config.data.max_seq_len)
        prepare_fake_quant(model, config.fake_quant)
        module = config.objective.build(model, config.model, data.tokenizer_fingerprint)
    resolved = resolve(config)
    if begun_before and not data.add_bos:
        del resolved["data"]["add_bos"]  # so that the next resume sees an old run as well
    reporter = Reporter(config, resolved, data, model, world)
    if too_long is not None:
        reporter.say(too_long)

    disks = find_disks(world, config.run_dir)
    folder = config.run_dir / layout.CHECKPOINTS
    # From here on files are written, which no other job may do in that directory meanwhile.
    with (
        _locked(config, world, disks),
        _left_out_if_full(config, disks),
        PeerFiles(world, disks, _served(config)) as peers,
    ):
        # 3. The checkpoint to resume from: refused here, if at all, before anything is written
        state = TrainerState(
            0, 0, 0, 0.0, data.digest, data.tokenizer_fingerprint, resolved, OrderRule.exact
        )
        before = None  # stored settings of the run to be resumed
        # On any disk: rank 0 may be on a new machine.
        has_saved = any(world.gather(bool(committed(folder))))
        with world.together():
            remote = _open_remote(config, process, disks, has_saved)
        storage = Storage(folder, world, disks, peers, remote, heartbeat.beat)
        if not disks.is_shared:
            reporter.say(_about_disks(config, storage))
        finder = CheckpointFinder(storage, reporter)
        located = finder.find(config.resume)
        with world.together():
            if located is not None:
                checkpoint = located.folder
                saved = read_state(checkpoint)
                before = saved.config
                keep_what_was_found(resolved, before, given)
                check_same_run(config, state, saved, reporter.say)
                check_same_model(checkpoint, model, config.optim.state, reporter.say)
                why = "the newest valid one" if config.resume == "auto" else "as resume says"
                reporter.say(f"resuming after step {saved.step}, from {checkpoint} ({why})")
                if config.total_steps is not None and saved.step > config.total_steps:
                    reporter.say(
                        f"resume: step {saved.step} is beyond the {config.total_steps} requested "
                        "steps; nothing is trained"
                    )
                order = order_of(saved, checkpoint.parent.parent)
                if order is not saved.order and len(data.sources) > 1:
                    reporter.say(f"resume: the checkpoint names no order of samples; using {order}")
                state = dataclasses.replace(saved, config=resolved, order=order)
                if disks.is_leader:
                    set_newer_aside(folder, checkpoint, remote, reporter)
                if world.rank == 0 and checkpoint.parent == folder:  # another run has its own
                    restore_logs(checkpoint / layout.LOGS, config.run_dir)
        finder.record_passed_over()

        # 4. The strategy materializes and distributes the model, and builds its optimizer
        prepare_training(
            model, compile=config.compile, checkpointing=config.activation_checkpointing
        )
        decay = Decay(resolved["optim"].get("decay", "matrices"))
        # Sharding replaces the parameters that carry the model's marks, so names are chosen now.
        decayed = decayed_names(model, decay)
        # Filling and distributing a large model takes minutes, which a stop must not wait for.
        process.refuse_to_start()
        with world.together():
            strategy: Strategy = config.parallel.build(world, config.precision)
            materializer = Materializer(module, model, config.model, config.seed, world.device)
            strategy.setup(
                module,
                module.materialize_with(materializer, world.device),
                partial(config.optim.build, decayed=decayed),
                config.optim.state,
                materializer.sparse,
            )
        if materializer.sparse:
            reporter.say(f"keep_zeros: {materializer.num_zeros} weights are zero and stay zero")
        # Eager: a few tokens, in other modes than a step's, would only compile other graphs.
        with world.together(), torch.compiler.set_stance("force_eager"):
            check_forward(config, strategy, module, world)
            settle(config, module, strategy, world, resolved, before, reporter.say, given)
            leave_unused(config, module, strategy, world, reporter.say)
        # After the probes, since finding unused parameters may rebuild the optimizer without state.
        if located is not None:
            load_checkpoint(located, strategy, state.step, world)
        process.refuse_to_start()

        # 5. The loop. Only a start that nothing refused any more takes over from an older one.
        checkpointer = Checkpointer(
            config.checkpoint,
            storage,
            Generation.claim(storage, state.step),
            partial(_save_assets, config.model, model, data, materializer.stored_names),
            reporter.event,
        )
        with world.together():
            loop = TrainingLoop(
                config, process, data, module, strategy, checkpointer, reporter, state
            )
        # Nothing is refused any more, so the run directory may describe this start.
        reporter.open(state)
        try:
            state, outcome = loop.run()
            # 6. The results
            saved_last = checkpointer.last_saved() or located
            assert saved_last is not None, "the loop saves the step at which it ends"
            _finish(config, process, reporter, checkpointer, saved_last, state.step, outcome)
        except BaseException as e:
            with suppress(OSError):  # for example of a full disk: it must not hide the first error
                reporter.event("fail", heartbeat.step, error=f"{type(e).__name__}: {e}")
                reporter.close("failed")
            raise
        finally:
            checkpointer.close()
    return outcome


def _prepare_data(
    config: TrainerConfig, process: Process, given: Collection[str]
) -> tuple[TrainerConfig, PreparedData, bool]:
    """Refuses what cannot run, as far as that needs no data, and prepares the data.

    Returns:
        Settings with `data.add_bos` as found out, the data, and whether the run to be resumed began
        before there was such a key.
    """
    world = process.world
    with world.together():
        config.check(world.world_size)
    process.heartbeat.at("data", 0)
    with world.together():
        # What can be refused is refused before the data is prepared, which may take hours.
        check_run_dir(config)
        if world.device.type == "cuda":
            gpu = torch.cuda.get_device_properties(world.device)
            check_memory(config, world.world_size, gpu.total_memory)
        model_config = hf_config_of(config.model)  # before the data is prepared, since it may raise
    # Data is prepared as for the run to be resumed, whose checkpoint is verified only later.
    stored = stored_config(config, world)
    begun_before = stored is not None and "add_bos" not in stored["data"]
    with world.together():
        if stored is not None and config.data.add_bos == "auto" and "data.add_bos" not in given:
            config = _with_bos(config, bool(stored["data"].get("add_bos")))
    disks = find_cache_disks(world, config.data)
    with PeerFiles(world, disks, {SERVED: cache_folder(config.data.cache_dir)}) as peers:
        exchange = DataExchange(config.data, process, disks, peers)
        data = exchange.prepare(
            partial(
                make_plan,
                config.data,
                model_path=getattr(config.model, "path", None),
                stop_requested=process.poll_apart,
                model_config=model_config,
                begun_before=begun_before,
            ),
            partial(_data_before, config, stored),
        )
    with world.together():
        config = _with_bos(config, data.add_bos)
        check_samples(data, config.data.max_seq_len)
        if config.data.verify:
            data.verify(exchange.share_of, process.poll_apart)
    return config, data, begun_before


def _data_before(config: TrainerConfig, stored: dict[str, Any] | None) -> Names | None:
    """Returns what the run to be resumed was trained on, if this machine knows it.

    Args:
        config: Settings of this start.
        stored: Settings of the run to be resumed. With other settings of the data, its folders are
            not what these sources would become.
    """
    if stored is None or data_changed(stored["data"], resolve(config)["data"]):
        return None
    # Rank 0 alone writes data.json; the others have it in checkpoints.
    checkpoints = committed(config.run_dir / layout.CHECKPOINTS)
    for folder in (config.run_dir, *(path / layout.LOGS for path in checkpoints)):
        if (names := recorded_names(folder, config.data)) is not None:
            return names
    return None


def _with_bos(config: TrainerConfig, add_bos: bool) -> TrainerConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, add_bos=add_bos))


@contextmanager
def _locked(config: TrainerConfig, world: World, disks: Disks) -> Iterator[None]:
    """Locks the run directory on each disk, for all ranks that share it."""
    with ExitStack() as stack:
        with world.together():
            if disks.is_leader:
                stack.enter_context(lock_run(config.run_dir))
        yield
        world.barrier()  # the locks are released once all ranks are done


@contextmanager
def _left_out_if_full(config: TrainerConfig, disks: Disks) -> Iterator[None]:
    """Has a machine whose own disk is full left out, wherever it is found."""
    try:
        yield
    except OSError as e:
        if disks.is_shared or not is_full(e):
            raise
        rule = f"the disk of {disks.hosts[disks.rank]} is full ({e})"
        fix = "free some space, then start that machine again"
        raise OwnDiskError("run.dir", config.run_dir, rule, fix, disks.rank) from e


def _served(config: TrainerConfig) -> dict[str, Path]:
    """Returns the folders with checkpoints that other machines may read."""
    served = {CHECKPOINTS: config.run_dir / layout.CHECKPOINTS}
    if config.resume not in ("auto", "never"):
        served[RESUME] = Path(config.resume).expanduser().absolute().parent
    return served


def _about_disks(config: TrainerConfig, storage: Storage) -> str:
    """Returns a line about what the loss of a machine costs a run without a shared disk."""
    num = storage.num_replicas(config.checkpoint.replicas)
    what = f"run.dir: {len(storage.disks.leaders)} machines have disks of their own; "
    if num:
        return what + f"each holds a copy of the files of {num} other{'s' * (num > 1)}"
    if config.checkpoint.upload is not None:
        return what + "what a lost one had is read from checkpoint.upload"
    return what + "the loss of one loses all checkpoints, since checkpoint.replicas is 0"


def _open_remote(
    config: TrainerConfig, process: Process, disks: Disks, has_saved: bool
) -> RemoteCheckpoints | None:
    url = config.checkpoint.upload
    # On one disk, rank 0 alone copies what is stored to it and from it.
    if url is None or (disks.is_shared and disks.rank != 0):
        return None

    def beat() -> None:
        if process.poll():
            raise Interrupted(f"told to stop while {url} did not answer; nothing was lost")

    remote = RemoteCheckpoints(url)
    if url.startswith("file://") and Path(url[7:]).resolve().is_relative_to(config.run_dir):
        raise ConfigError(
            "checkpoint.upload",
            url,
            "is inside the run directory, which already has the checkpoints",
            "name a folder on another disk",
        )
    if disks.is_leader:
        remote.check(begun_before=has_saved, beat=beat)
    return remote


def _finish(
    config: TrainerConfig,
    process: Process,
    reporter: Reporter,
    checkpointer: Checkpointer,
    located: Located,
    step: int,
    outcome: ExitCode,
) -> None:
    world = process.world
    process.heartbeat.at("finish", step)  # which may take longer than anything in the loop
    checkpoint = located.folder
    finished = outcome is ExitCode.FINISHED
    # All ranks stop; only those that got the signal know the reason.
    reasons = [reason for reason in world.gather(process.stop.reason) if reason]
    with world.together():
        # Meanwhile the last upload goes on in its thread.
        if finished and config.export.at_end and world.rank == 0:
            export_checkpoint(located, config.run_dir / layout.EXPORT, config.export.dtype)
            located.forget_fetched()
    with world.together():
        failure = checkpointer.wait_for_uploads(finished)
        if failure is not None and finished:
            raise SpotforgeError(f"finished, but {checkpoint} was not uploaded: {failure}")
    if finished:
        reporter.event("finish", step)
    else:
        reporter.event("stop", step, reason=reasons[0] if reasons else "unknown")
        reporter.say(  # before the report, whose charts take seconds to draw
            f"stopped after saving {checkpoint} ({reasons[0] if reasons else 'unknown'}); the same "
            "command goes on from there"
        )
    reporter.close("finished" if finished else "stopped")
    if finished:
        reporter.say_what_next(checkpoint)


def _set_up_process(config: TrainerConfig) -> None:
    keep_freed_memory()
    if config.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which is read at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _set_special_tokens(config: ModelConfig, model: Any, data: PreparedData) -> None:
    """Gives a model from scratch the special tokens of the data's tokenizer, not its family's.

    Values that `model.config` sets stay, and so does a padding token that the model has.
    """
    if not isinstance(config, NamedModelConfig):
        return
    names = {"bos_token_id", "eos_token_id"}
    if model.config.get_text_config().pad_token_id is None:
        names.add("pad_token_id")
    for name in names - config.config.keys():
        for described in filter(None, (model.config, model.generation_config)):
            value = getattr(data.tokenizer, name)
            set_special_token(described, name, value, otherwise=data.tokenizer.eos_token_id)


def _save_assets(
    config: ModelConfig,
    model: PreTrainedModel,
    data: PreparedData,
    stored_names: list[str] | None,
    folder: Path,
) -> None:
    """Writes what an export needs beside tensors."""
    model.config.save_pretrained(folder)
    given = None
    if isinstance(config, PathModelConfig):
        given = find_file(config, GENERATION_CONFIG_NAME)
    if given is not None:  # an unchanged copy keeps all end tokens and sampling defaults
        shutil.copyfile(given, folder / GENERATION_CONFIG_NAME)
    elif model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    if stored_names is not None:
        (folder / layout.STORED_NAMES).write_text(json.dumps(stored_names))
