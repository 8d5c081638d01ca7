"""Schemas of requests in OpenAI's API; unsupported fields are refused, not ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.text.tools import call_schema
from trainer.data.messages import for_template

_SEED = Annotated[int, Field(ge=-(2**63), lt=2**63)]
# Within these limits an engine compiles any schema in about a second.
_SCHEMA_LEVELS = 100
_SCHEMA_BYTES = 2**16
_DEFAULT = "Default: the value in the model's generation_config.json."
_TOKEN_ID = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool | None = None


class JsonSchema(_Body):
    """A JSON schema that the answer must satisfy."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_small(self) -> JsonSchema:
        check_schema(self.schema_)
        return self


class ResponseFormat(_Body):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type=json_schema, and only then")
        return self

    def schema_of_text(self) -> dict[str, Any] | None:
        """Returns the schema that the text must satisfy; None: any text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


def check_schema(schema: dict[str, Any]) -> None:
    """Raises ValueError for a schema that an engine may take more than two seconds to compile."""
    # Level by level and not recursively, since the nesting is what may be too deep.
    level: list[Any] = [schema]
    for _ in range(_SCHEMA_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            break
    else:
        raise ValueError(f"a schema must have at most {_SCHEMA_LEVELS} levels")
    if len(json.dumps(schema)) > _SCHEMA_BYTES:
        raise ValueError(f"a schema must have at most {_SCHEMA_BYTES} bytes")


class _Sampling(_Body):
    """Fields that completions and chats have in common."""

    model: str = Field(max_length=256)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description=_DEFAULT)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description=_DEFAULT)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description=f"{_DEFAULT} 0 and -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description=_DEFAULT)
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description=_DEFAULT
    )
    n: int | None = Field(None, ge=1, le=128, description="Default: 1.")
    seed: _SEED | None = None
    response_format: ResponseFormat | None = None
    stop: str | list[Annotated[str, Field(max_length=512)]] | None = Field(None, max_length=512)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    ignore_eos: bool | None = Field(None, description="Ignore EOS up to max_tokens.")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="Only 0 is supported.")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="Only 0 is supported.")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be given with stream=true only")
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError("stop must have at most 4 texts")
        return self

    @model_validator(mode="after")
    def _a_schema_has_an_end(self) -> _Sampling:
        if self.ignore_eos and self.schema_of_text() is not None:
            field = self.schema_field()
            raise ValueError(f"ignore_eos must be false with {field}, whose text ends with EOS")
        return self

    def schema_of_text(self) -> dict[str, Any] | None:
        """Returns the schema that the text must satisfy; None: any text."""
        return None if self.response_format is None else self.response_format.schema_of_text()

    def schema_field(self) -> str:
        """Returns the name of the field with the schema."""
        return "response_format"

    def num_choices(self) -> int:
        """Returns the number of choices for each prompt."""
        return 1 if self.n is None else self.n

    def stops(self) -> list[str]:
        """Returns the stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def includes_usage(self) -> bool:
        """Returns whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> dict[str, float]:
        """Returns the fields of `SamplingParams` that are given, by name."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in fields.items() if value is not None}


class CompletionRequest(_Sampling):
    """Body of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[_TOKEN_ID], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_TOKEN_ID], Field(min_length=1)]],
            Field(min_length=1, max_length=128),
        ]
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Default: 16.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    prompts_field: ClassVar[str] = "prompt"
    default_limit: ClassVar[int | None] = 16

    def limit(self) -> int | None:
        """Returns the limit on new tokens; None: not given."""
        return self.max_tokens

    def limit_field(self) -> str:
        """Returns the name of the field with the limit."""
        return "max_tokens"

    def num_logprobs(self) -> int | None:
        """Returns the number of alternatives for each token; None: no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class FunctionCall(_Body):
    """A call of a function by a model."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_json(self) -> FunctionCall:
        try:
            json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise ValueError("arguments must be JSON") from e
        return self


class ToolCall(_Body):
    """A call of a tool by a model."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(_Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


# Fields of a message that are passed to a chat template.
_SAID = {"role", "content", "name", "tool_calls", "tool_call_id"}


class Message(_Body):
    """A message of a conversation.

    A model's answer may be sent back unchanged, so its null fields are accepted.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing, which only a message with tool_calls may lack")
        return self

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates expect it: one text, arguments as objects."""
        said = self.model_dump(include=_SAID, exclude_none=True)
        return for_template(said)


class Function(_Body):
    """A function that a model may call."""

    name: str = Field(max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_small(self) -> Function:
        check_schema(self.parameters or {})
        return self


class Tool(_Body):
    """A tool that a model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    """The name of a function that must be called."""

    name: str = Field(max_length=64)


class NamedTool(_Body):
    """A tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class Unsupported(_Body):
    """Fields of OpenAI's API that are not supported; null is accepted, since clients send it."""

    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    modalities: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    safety_identifier: None = None
    service_tier: None = None
    store: None = None
    verbosity: None = None
    web_search_options: None = None


class ChatRequest(_Sampling, Unsupported):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must be given with logprobs=true only")
        return self

    @model_validator(mode="after")
    def _what_is_to_be_called_is_there(self) -> ChatRequest:
        if not self.must_call:
            return self
        names = self.function_names()
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if not names or (named is not None and named not in names):
            raise ValueError(f"tool_choice must name one of tools: {', '.join(names) or 'none'}")
        # Each function's schema is small enough, but all of them together may not be.
        check_schema(self.schema_of_text() or {})
        return self

    @property
    def must_call(self) -> bool:
        """True if the answer must be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def schema_of_text(self) -> dict[str, Any] | None:
        """Returns the schema of a call if one is required, otherwise that of response_format."""
        if not self.must_call:
            return super().schema_of_text()
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            functions = [function for function in functions if function.name == name]
        return call_schema({function.name: function.parameters for function in functions})

    def schema_field(self) -> str:
        """See `_Sampling`."""
        return "tool_choice" if self.must_call else super().schema_field()

    prompts_field: ClassVar[str] = "messages"
    default_limit: ClassVar[int | None] = None

    def limit(self) -> int | None:
        """See `CompletionRequest`."""
        return self.max_completion_tokens or self.max_tokens

    def limit_field(self) -> str:
        """See `CompletionRequest`."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def num_logprobs(self) -> int | None:
        """See `CompletionRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def function_names(self) -> list[str]:
        """Returns the names of the tools' functions."""
        return [tool.function.name for tool in self.tools or ()]

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Returns the tools for the chat template; None: no tools."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class EmbeddingRequest(_Body):
    """Body of `/v1/embeddings`."""

    model: str = Field(max_length=256)
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[_TOKEN_ID], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_TOKEN_ID], Field(min_length=1)]],
            Field(min_length=1, max_length=2048),
        ]
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="Default: float.")
    dimensions: None = None
    user: str | None = Field(None, max_length=256)

    prompts_field: ClassVar[str] = "input"

    def inputs(self) -> list[str | list[int]]:
        """Returns the inputs as a list."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)
