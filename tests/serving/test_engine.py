"""The transformers engine as a process: its tokens, and what becomes of them when it dies."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression.targets.packing import load_folder
from core.errors import ConfigError, DamagedError, SpotforgeError
from serving.engine import EngineError, TokenRequest
from serving.engines.process import ProcessEngine, Watch
from tests.serving.conftest import caught_at, save_model, until

PROMPT = [70, 71, 72, 73, 74]


def engine(folder, max_context=256, **watch):
    settings = dict(
        folder=str(folder),
        target=None,
        max_context=max_context,
        max_running=8,
        max_batch_tokens=64,
        kv_cache_tokens=2048,
        num_threads=1,
    )
    command = [sys.executable, "-m", "serving.engines.transformers_worker", json.dumps(settings)]
    return ProcessEngine(command, Watch(**watch))


async def tokens_of(running, name, prompt=PROMPT, max_tokens=20, **settings):
    found, logprobs = [], []
    settings = {"ignore_eos": True, **settings}
    async for chunk in running.submit(TokenRequest(name, prompt, max_tokens, **settings)):
        found += chunk.tokens
        logprobs += chunk.logprobs or []
        reason = chunk.finish_reason
    return found, logprobs, reason


def cpu_s(pid):
    """CPU time of a process, which unlike the clock's is no longer on a busy machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_engine(folder, work, **watch):
    async def run():
        running = engine(folder, **watch)
        await running.start()
        try:
            return await work(running)
        finally:
            await running.close()

    return asyncio.run(run())


def test_greedy_tokens_are_those_of_generate(export):
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    prompts = [PROMPT, list(range(60, 200)), [5]]  # the second is longer than a step

    async def work(running):
        every = [tokens_of(running, str(i), p, temperature=0) for i, p in enumerate(prompts)]
        return [found for found, _, _ in await asyncio.gather(*every)]

    found = with_engine(export, work)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == wanted[0, len(prompt) :].tolist()


def test_sampling_logprobs_eos_and_embeddings(export):
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)

    async def work(running):
        alone, _, _ = await tokens_of(running, "a", seed=5)
        names = [f"b{i}" for i in range(6)]
        together = await asyncio.gather(
            *(tokens_of(running, n, seed=i, temperature=0.9) for i, n in enumerate(names)),
            tokens_of(running, "c", seed=5, logprobs=3),
            tokens_of(running, "d", seed=5, temperature=0, top_p=0.5),
        )
        assert together[6][0] == alone, "the others in the batch decide what is drawn"
        assert len({tuple(found) for found, _, _ in together[:6]}) == 6
        seeds = [
            tokens_of(running, f"e{i}", seed=i, ignore_eos=False, max_tokens=200) for i in range(8)
        ]
        ended = await asyncio.gather(*seeds)
        vectors = await running.embed("v", [PROMPT, [1, 2]])
        return alone, together[6][1], ended, vectors

    alone, logprobs, ended, vectors = with_engine(export, work)
    with torch.no_grad():
        output = model(torch.tensor([PROMPT + alone]), output_hidden_states=True)
        hidden = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
    wanted = output.logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    for i, (token, found) in enumerate(zip(alone, logprobs, strict=True)):
        assert found.logprob == pytest.approx(wanted[i, token].item(), abs=1e-3)
        assert [t for t, _ in found.top] == wanted[i].topk(3).indices.tolist()
    for found, _, reason in ended:
        assert 0 not in found  # EOS itself is not told
        assert reason == ("length" if len(found) == 200 else "stop")
    mean = hidden.mean(0)
    assert torch.allclose(torch.tensor(vectors[0]), mean / mean.norm(), atol=1e-4)


def test_a_request_outlives_its_engine(export):
    async def work(running):
        wanted, _, _ = await tokens_of(running, "w", max_tokens=150, seed=3)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pid = running.pid
            again = partial(tokens_of, running, max_tokens=150, seed=3)
            restarts = running.stats().restarts
            task = await caught_at(running, again, 1, number)
            await until(lambda n=restarts: running.stats().restarts > n, "another process")
            found, _, reason = await task
            assert (found, reason) == (wanted, "length")
            await until(lambda: running.is_ready, "the engine is ready again")
            assert running.pid != pid
        assert running.stats().restarts == 2

    with_engine(export, work, silence_s=2.0)


@pytest.mark.long
def test_on_a_starved_host_an_engine_is_kept_and_one_that_hangs_is_found(export):
    async def work(running):
        await tokens_of(running, "a")
        spins = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
            for _ in range(6 * os.cpu_count())
        ]
        try:
            await asyncio.sleep(10)
            assert running.is_ready and running.stats().restarts == 0
            pid = running.pid
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: running.stats().restarts == 1, "another process")
        finally:
            for spin in spins:
                spin.kill()
                await spin.wait()
        await until(lambda: running.is_ready, "the engine is ready again")
        assert running.pid != pid and running.stats().restarts == 1

    with_engine(export, work, silence_s=1.0)


@pytest.mark.long
def test_an_engine_that_spins_without_a_word_is_found(tmp_path):
    program = tmp_path / "spins.py"
    program.write_text(
        "import json, sys\n"
        "def say(**line): print(json.dumps(line), flush=True)\n"
        "say(ready={'engine': 'spins', 'max_context': 8, 'max_running': 1})\n"
        "asked = json.loads(input())['submit']['id']\n"
        "say(step={'tokens': [[asked, [1], [[-1.0, []]]]], 'finished': [[asked, 'length']],"
        " 'running': 0, 'kv_cache_usage': 0})\n"
        "while True: pass\n"
    )

    async def work():
        watch = Watch(silence_s=1.0, step_timeout_s=2.0)
        running = ProcessEngine([sys.executable, str(program)], watch)
        await running.start()
        try:
            await until(lambda: running.stats().restarts > 0, "another process")
        finally:
            await running.close()

    asyncio.run(work())


def test_what_kills_an_engine_twice_is_given_up(export):
    """A token beyond the embedding: the gateway refuses it, and an engine would be lost."""

    async def work(running):
        with pytest.raises(EngineError, match="failed twice"):
            await tokens_of(running, "poison", prompt=[99999])
        await until(lambda: running.is_ready, "the engine is ready again")
        assert len((await tokens_of(running, "after"))[0]) == 20

    with_engine(export, work)


def test_many_inputs_to_embed_hold_up_no_stream(export):
    async def work(running):
        began_s = cpu_s(running.pid)
        await running.embed("some", [[5] * 250] * 100)
        some_s = cpu_s(running.pid) - began_s
        many = asyncio.create_task(running.embed("many", [[5] * 250] * 3000))
        await tokens_of(running, "a")
        assert not many.done()
        began_s = cpu_s(running.pid)
        many.cancel()  # what nobody waits for is not computed
        vectors = await running.embed("one", [PROMPT])
        return vectors, cpu_s(running.pid) - began_s, some_s

    [vector], one_s, some_s = with_engine(export, work)
    assert one_s < 15 * some_s
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)


def test_leaving_early_cancels(export):
    async def work(running):
        made, on_step = Counter(), running._on_step

        def listen(step):
            made.update({name: len(tokens) for name, tokens, _ in step["tokens"]})
            on_step(step)

        running._on_step = listen  # the engine's own count leaves out what nobody waits for
        for i in range(20):  # all tokens may have come before a slow machine says that it leaves
            stream = running.submit(TokenRequest(f"a{i}", PROMPT, 200, ignore_eos=True))
            await anext(stream)
            await stream.aclose()
            await until(lambda: not running.stats().running, "the engine is idle")
            if made[f"a{i}"] < 200:
                break
        assert made[f"a{i}"] < 200
        await asyncio.sleep(0.3)
        assert made[f"a{i}"] < 200 and not running.stats().running

    with_engine(export, work)


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    # transformers would draw them at random, and what it answers would be nonsense.
    folder = tmp_path / "m"
    save_model(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"1 of .* model.layers.1.mlp.up_"):
        load_folder(folder)


def test_code_that_lies_beside_a_model_is_not_run_nor_asked_about(tmp_path):
    save_model(tmp_path)
    path = tmp_path / "config.json"
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own))

    async def start():
        with pytest.raises(ConfigError, match="contains custom code"):
            await engine(tmp_path, start_timeout_s=60).start()

    asyncio.run(start())


def test_a_model_whose_weights_are_no_numbers_does_not_start(tmp_path):
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    async def start():
        with pytest.raises(SpotforgeError, match="NaN or infinite"):
            await engine(tmp_path).start()

    asyncio.run(start())


def test_one_that_does_not_start_says_why(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    async def start():
        running = engine(tmp_path)
        with pytest.raises(SpotforgeError, match="no file named model.safetensors"):
            await running.start()
        assert running.pid is None

    asyncio.run(start())
