"""A server with OpenAI's completions, in vLLM's dialect or everybody's, that fails when told to.

As a program (`python -I FILE serve ... --uds PATH`, behind `-m vllm...`) it is a vLLM, as far as a
client can see. Each answer counts up from one more than the prompt's last token, and ends with
token 0 at the 50th.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys

END = 50  # tokens, after which the model ends by itself


class FakeServer:
    """What it says and does; a test sets the attributes at any time.

    Attributes:
        tells_ids: It speaks vLLM's dialect.
        token_s: Seconds a token.
        refuses: (status, headers, message) of every answer.
        error_code: Of an error in a stream.
        stalls_after, breaks_after, errs_after: Tokens of a stream, once; then it says no more,
            closes the connection, or sends an error.
        holds: File; as long as it exists, a stream of over 10 tokens has no more than these.
        seen: Bodies of requests.
        cancelled: Streams whose client went away.
    """

    def __init__(self, tells_ids=True, models=("m",)):
        self.tells_ids, self.models = tells_ids, models
        self.token_s, self.refuses, self.tells_usage = 0.0, None, True
        self.stalls_after = self.breaks_after = self.errs_after = None
        self.error_code, self.holds = 500, None
        self.seen, self.headers, self.cancelled = [], [], 0

    async def start(self, **where):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, **where)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self):
        self.server.close()

    async def _serve(self, reader, writer):
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                headers = dict(
                    line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line
                )
                self.headers.append(headers)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path == "/v1/completions":
                    await self._complete(json.loads(body), writer)
                else:
                    self._answer(writer, 200, self._about(path))
                await writer.drain()
        writer.close()

    def _about(self, path):
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/metrics":
            return 'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        card = {"owned_by": "vllm", "max_model_len": 128} if self.tells_ids else {}
        return {"data": [{"id": model, **card} for model in self.models]}

    def _answer(self, writer, status, content, headers=()):
        body = content if isinstance(content, str) else json.dumps(content)
        lines = [f"HTTP/1.1 {status} -", f"content-length: {len(body)}", *headers]
        writer.write("\r\n".join([*lines, "", body]).encode())

    async def _complete(self, body, writer):
        self.seen.append(body)
        if self.refuses is not None:
            status, headers, message = self.refuses
            return self._answer(writer, status, {"error": {"message": message}}, headers)
        writer.write(b"HTTP/1.1 200 -\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            await self._stream(body, writer)
        except ConnectionError:
            self.cancelled += 1
            raise

    async def _stream(self, body, writer):
        token, count = body["prompt"][-1], 0
        while count < body["max_tokens"]:
            await asyncio.sleep(self.token_s)
            self._fail(count, writer)
            while count == 10 and self.holds is not None and os.path.exists(self.holds):
                await asyncio.sleep(0.02)
            if self.stalls_after == count:
                await asyncio.sleep(30)
            token, count = token + 1, count + 1
            ends = token % END == 0 and not body.get("ignore_eos")
            reason = "stop" if ends else "length" if count == body["max_tokens"] else None
            text = "" if ends else f"{token}\u2028"
            choice = {"index": 0, "text": text, "finish_reason": reason}
            if self.tells_ids and body.get("return_token_ids"):
                choice["token_ids"] = [0 if ends else token]
                if (alternatives := body.get("logprobs")) is not None:
                    top = {f"token_id:{token + i}": -1.0 - i for i in range(max(1, alternatives))}
                    choice["logprobs"] = {"token_logprobs": [-1.0], "top_logprobs": [top]}
            self._event(writer, {"choices": [choice]})
            await writer.drain()
            if ends:
                break
        if self.tells_usage and body.get("stream_options", {}).get("include_usage"):
            self._event(writer, {"choices": [], "usage": {"completion_tokens": count + 2}})
        self._data(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def _fail(self, count, writer):
        if self.breaks_after == count:
            self.breaks_after = None
            writer.close()
            raise ConnectionError
        if self.errs_after == count:
            self.errs_after = None
            self._event(writer, {"error": {"message": "it failed", "code": self.error_code}})

    def _event(self, writer, content):
        # Not in ASCII, as vLLM writes it.
        data = json.dumps(content, ensure_ascii=False)
        self._data(writer, b"data: " + data.encode() + b"\n\n")

    def _data(self, writer, data):
        if writer.transport.is_closing():
            raise ConnectionResetError
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))


async def main(settings):
    """As `vllm serve`, whose flags it knows, and no others."""
    if os.environ.get("FAKE_VLLM_FAILS"):
        print("INFO: OSError: is only mentioned")
        print("(EngineCore pid=7) ERROR 11-25 09:38:01 [core.py:1512] ValueError: no such layer")
        sys.exit("RuntimeError: Engine core initialization failed")
    fake = FakeServer(models=(settings.served_model_name,))
    fake.holds = os.environ.get("FAKE_VLLM_HOLDS")
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with await asyncio.start_unix_server(fake._serve, settings.uds):
        with open(os.environ["FAKE_VLLM_LOG"], "a") as log:
            print(json.dumps(sys.argv), file=log)
        await stopping.wait()
        with open(os.environ["FAKE_VLLM_LOG"], "a") as log:
            print(json.dumps("SIGTERM"), file=log)
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for flag in ("served-model-name", "uds", "generation-config", "dtype"):
        parser.add_argument(f"--{flag}", required=True)
    for flag in (
        "max-model-len",
        "max-num-seqs",
        "max-num-batched-tokens",
        "max-num-queued-reqs",
        "shutdown-timeout",
        "seed",
    ):
        parser.add_argument(f"--{flag}", required=True, type=int)
    parser.add_argument("--no-enable-log-requests", action="store_true", required=True)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true", required=True)
    asyncio.run(main(parser.parse_args()))
