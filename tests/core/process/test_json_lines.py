"""Both ends of a pipe of JSON lines, in one program that answers."""

import asyncio
import os
import sys

import pytest

from core.process.child import popen
from core.process.json_child import ChildEnded, JsonChild
from core.process.python import ROOT

LINES = ROOT / "core/process/json_lines.py"
# Loaded as the Python of another environment loads it: by its path.
PROGRAM = f"""
import importlib.util, sys, threading
spec = importlib.util.spec_from_file_location("json_lines", {str(LINES)!r})
lines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lines)
pipe = lines.JsonLines()
print("a library's chatter", flush=True)
pipe.say("ready", sorted({{"core", "torch"}} & set(sys.modules)))
while True:
    messages = pipe.heard(30)
    pipe.say_all([("count", len(messages)), *messages])
    if messages[-1] == ("post", 1):
        threading.Thread(target=pipe.post, args=("posted", "by a thread")).start()
    if messages[-1] == ("busy", 1):
        while True:
            pass
"""


def start(hear):
    return JsonChild.start([sys.executable, "-I", "-S", "-c", PROGRAM], hear)


def test_messages_of_any_length_go_both_ways():
    async def work():
        heard: asyncio.Queue = asyncio.Queue()
        child = await start(lambda *message: heard.put_nowait(message))
        assert await heard.get() == ("ready", [])
        text = "naïve \n" * 400_000
        child.say("text", text)
        child.say("null", None)
        said = []
        while ("null", None) not in said:
            said.append(await heard.get())
        assert [m for m in said if m[0] != "count"] == [("text", text), ("null", None)]
        child.say("post", 1)
        while (await heard.get()) != ("posted", "by a thread"):
            pass
        await child.kill()
        assert "died of SIGKILL" in await child.last_words()

    asyncio.run(work())


def test_what_is_said_in_one_turn_is_heard_at_once():
    async def work():
        heard: asyncio.Queue = asyncio.Queue()
        child = await start(lambda *message: heard.put_nowait(message))
        await heard.get()
        for i in range(20):
            child.say("number", i)
        found = [await heard.get() for _ in range(21)]
        assert found == [("count", 20), *(("number", i) for i in range(20))]
        await child.kill()

    asyncio.run(work())


@pytest.mark.parametrize("said", [[], ["busy"]])
def test_a_program_ends_with_its_pipe_even_while_it_computes(said):
    """Also where no signal tells it, as on macOS."""

    async def work():
        heard: asyncio.Queue = asyncio.Queue()
        child = await start(lambda *message: heard.put_nowait(message))
        await heard.get()
        for word in said:
            child.say(word, 1)
            while (await heard.get())[0] != word:
                pass
        child._process.stdin.close()
        with pytest.raises(ChildEnded, match="ended with exit code 0: a library's chatter"):
            await child.unless_it_ends(asyncio.Event().wait())
        await child.kill()

    asyncio.run(work())


def test_a_program_that_nobody_hears_ends():
    read, write = os.pipe()
    with popen([sys.executable, "-I", "-S", "-c", PROGRAM], stdin=read, stdout=-1) as process:
        process.stdout.close()
        os.write(write, b'{"x": 1}\n')
        assert process.wait(60) == 0
    os.close(read)
    os.close(write)
