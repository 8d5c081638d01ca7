"""Calls in the answers of several families, and what their chat templates are shown."""

import dataclasses
import json

import httpx
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from serving.text.call_formats import LlamaCalls, MistralCalls, format_of
from serving.text.tools import ToolCallParser
from tests.serving.conftest import TEMPLATE

PUNE = ("weather", {"city": "Pune"})
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "now")
]
ASK = [{"role": "user", "content": "Weather?"}]
# As the templates of these models say how to call.
SHOWN = {
    "<tool_call>\\n{{ call.function | tojson }}\\n</tool_call>": ToolCallParser,
    'Respond in the format {"name": function name, "parameters": dictionary of argument'
    " name and its value}.": LlamaCalls,
    """{{- '{"name": "' + call.name + '", ' }}
    {{- '"parameters": ' }}""": LlamaCalls,
    "[func_name1(params_name1=params_value1, params_name2=params_value2)]": LlamaCalls,
    "{{- '<|python_tag|>' + call.name + '.call(' }}": LlamaCalls,
    "[TOOL_CALLS] [{% for call in message.tool_calls %}": MistralCalls,
    "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}": MistralCalls,
    "<tool_call>\\n<function=example>\\n<parameter=p>": None,
    "<tool_call>{name}\\n<arg_key>k</arg_key>": None,
    "<｜tool▁calls▁begin｜>": None,
    '{"name": "{{ f.name }}", "description": "{{ f.description }}", "parameters": {}}': None,
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}": None,
}


@pytest.mark.parametrize("shown", SHOWN)
def test_a_template_shows_its_family(shown):
    found, wanted = format_of(shown), SHOWN[shown]
    if wanted is None:
        assert found is None
    else:
        assert isinstance(found.parser([]), wanted)


LLAMA = {
    '{"name": "weather", "parameters": {"city": "Pune"}}': ("", [PUNE]),
    ' \n<|python_tag|>{"name": "weather", "parameters": {"city": "Pune"}}': ("", [PUNE]),
    'I look.<|python_tag|>{"name": "weather", "arguments": {"city": "Pune"}}': ("I look.", [PUNE]),
    '{"name": "weather", "parameters": {"city": "Pune"}}; {"name": "now", "parameters": {}}': (
        "",
        [PUNE, ("now", {})],
    ),
    "<|python_start|>[weather(city='Pune'), now()]<|python_end|>": ("", [PUNE, ("now", {})]),
    '[weather(city="Pune", days=[1, {"a": None}], dry=false)]': (
        "",
        [("weather", {"city": "Pune", "days": [1, {"a": None}], "dry": False})],
    ),
    "[elsewhere(x=1)]": None,
    "[weather('Pune')]": None,
    "[weather(**city)]": None,
    "[weather(city=open('x'))]": None,
    "[1] is a note": None,
    "[weather is fine": None,
    '{"name": "weather"} is what it wants': None,
    '{"city": "Pune"}': None,
    '{"name": "weather", "parameters": {"city": ': None,
    "It is {sunny} there, <|pyth": None,
    "[" * 5000: None,
    "": None,
}
MISTRAL = {
    '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Pune"}, "id": "abcdefghi"}]': (
        "",
        [PUNE],
    ),
    'Well.[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Pune"}}, {"name": "now",'
    ' "arguments": {}}]': ("Well.", [PUNE, ("now", {})]),
    '[TOOL_CALLS]weather[ARGS]{"city": "Pune"}[TOOL_CALLS]now[ARGS]{}': ("", [PUNE, ("now", {})]),
    'Well.[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Pune"}': ("Well.", [PUNE]),
    '[TOOL_CALLS]weather{"city": "Pune"}': ("", [PUNE]),
    '[TOOL_CALLS]weather[ARGS]{"city": ': None,
    "[TOOL_CALLS] nothing of the kind": None,
    "[TOOL_CA": None,
    "It is [sunny] there": None,
}


@pytest.mark.parametrize(
    ("parser", "text", "wanted"),
    [(LlamaCalls, *item) for item in LLAMA.items()]
    + [(MistralCalls, *item) for item in MISTRAL.items()],
)
def test_calls_in_pieces(parser, text, wanted):
    said, calls = wanted or (text, [])
    for size in (1, 3, 10_000):
        found, told = parser(["weather", "now"]), ["", []]
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        for i, piece in enumerate([*pieces, ""]):
            more, new = found.feed(piece, i == len(pieces))
            told = [told[0] + more, told[1] + new]
        assert told[0] == said
        assert [(x["name"], json.loads(x["arguments"])) for x in told[1]] == calls


def test_a_text_that_cannot_be_a_call_is_told_at_once():
    for text in ("It is sunny", "[1] note", "{sunny}", "<b>"):
        assert LlamaCalls(["weather"]).feed(text, False) == (text, [])


CALLS = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Pune", "near": ["é"]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "Sunny"},
]
ITERATES = "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
PRINTS = "{{ call.function.arguments | tojson }}"


def with_template(parts, template):
    """A server whose model has another chat template."""
    parts.files = dataclasses.replace(parts.files, chat_template={"default": template})
    return parts


def test_templates_are_given_arguments_as_objects(served):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
        f"{ITERATES}<tool_call>{PRINTS}</tool_call>{{% endfor %}}\n{{% endfor %}}"
    )
    with with_template(served(), template) as running:
        body = {"model": "tiny", "messages": CALLS, "max_tokens": 1}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        prompt = running.files.tokenizer().decode(running.engine.seen[-1].prompt)
    arguments = json.loads(CALLS[1]["tool_calls"][0]["function"]["arguments"])
    called = {"function": {"name": "weather", "arguments": arguments}}
    messages = [ASK[0], {"role": "assistant", "content": "", "tool_calls": [called]}, CALLS[2]]
    [[wanted], _] = render_jinja_template([messages], chat_template=template)
    assert prompt == wanted
    assert "city=Pune;near=" in prompt
    assert '<tool_call>{"city": "Pune", "near": ["é"]}</tool_call>' in prompt


def test_calls_that_are_not_read_are_refused(served):
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    body = {"model": "tiny", "messages": ASK, "max_tokens": 2, "tools": TOOLS}
    with with_template(served(), template) as running:
        url = f"{running.url}/v1/chat/completions"
        for choice in (None, "auto"):
            answer = httpx.post(url, json=body | {"tool_choice": choice})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "tools")
            assert "set tool_choice" in error["message"]
        assert httpx.post(url, json=body | {"tool_choice": "none"}).status_code == 200


def test_marks_that_are_special_tokens_are_seen_and_ids_fit(served):
    parts = served()
    tokenizer = parts.files.tokenizer()
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    parts.files = dataclasses.replace(parts.files, backend=tokenizer.to_str())
    text = 'Well.[TOOL_CALLS]weather[ARGS]{"city": "Pune"}'
    parts.engine.tokens = tokens = tokenizer.encode(text).ids
    assert {tokenizer.token_to_id(mark) for mark in ("[TOOL_CALLS]", "[ARGS]")} <= {*tokens}
    with with_template(parts, TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]")) as running:
        body = {"model": "tiny", "messages": ASK, "max_tokens": len(tokens), "tools": TOOLS}
        url = f"{running.url}/v1/chat/completions"
        [choice] = httpx.post(url, json=body).json()["choices"]
        [call] = choice["message"]["tool_calls"]
        assert choice["message"]["content"] == "Well."
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == PUNE
        assert len(call["id"]) == 9 and call["id"].isalnum()  # Mistral's templates refuse others
        [choice] = httpx.post(url, json=body | {"tool_choice": "none"}).json()["choices"]
        assert choice["message"]["content"] == 'Well.weather{"city": "Pune"}'
