"""Child processes that talk in lines, whatever they say."""

import asyncio
import os
import sys

import pytest

from serving.child import Child, ChildEnded

LINES = "import sys, json; say = lambda x: print(json.dumps(x), flush=True)\n"


def run(program, *said):
    """What a program says to some lines, and how it ends."""

    async def work():
        heard = []
        hear = lambda kind, content: heard.append((kind, content))  # noqa: E731
        child = await Child.start([sys.executable, "-c", LINES + program], hear)
        for content in said:
            child.say("line", content)
        with pytest.raises(ChildEnded) as ended:
            await child.unless_it_ends(asyncio.Event().wait())
        await child.kill()
        return heard, str(ended.value)

    return asyncio.run(work())


def test_lines_of_any_length():
    text = "naïve \n" * 400_000
    heard, ended = run("say(json.loads(input())); say(json.loads(input())); sys.exit(3)", text, 1)
    assert heard == [("line", text), ("line", 1)]
    assert ended == "ended with 3, and said nothing"


def test_ctrl_c_is_not_for_it_and_its_share_of_a_cpu_is_the_gateways():
    told, _ = run("import os; say({'group': os.getpgid(0), 'session': os.getsid(0)})")
    assert dict(told)["group"] != os.getpgid(0)
    assert dict(told)["session"] == os.getsid(0)  # Linux shares a CPU among sessions


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "sys.stderr.write('12%\\r' * 10**6 + 'no memory'); sys.exit(1)",
            "ended with 1: no memory",
        ),
        ("sys.stderr.write('x' * 5 * 10**6 + '\\nno memory\\n\\n'); sys.exit(1)", "1: no memory"),
        ("say({'fatal': 'it is full'}); print('noise', file=sys.stderr)", "with 0: it is full"),
        ("print('no json', flush=True); input()", "killed by signal 9: what it said makes no"),
        ("say([1]); input()", "killed by signal 9: what it said makes no sense"),
    ],
)
def test_last_words(program, words):
    assert words in run(program)[1]
