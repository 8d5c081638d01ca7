"""Metadata services of three clouds on loopback, which announce the end of a machine when told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_AWS = "/latest/meta-data/spot/instance-action"
_GCP = "/computeMetadata/v1/instance/preempted"
_AZURE_NAME = "/metadata/instance/compute/name"
_AZURE_EVENTS = "/metadata/scheduledevents"


class Metadata:
    """Answers as the clouds document it; set `announced` to have the machine go away."""

    def __init__(self):
        self.announced = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                self._answer(200, "a-token")

            def do_GET(self):
                self._answer(*service._answer(self.path.split("?")[0]))

            def _answer(self, status, body):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path):
        if path == _AWS:
            action = {"action": "terminate", "time": "2030-01-01T00:00:00Z"}
            return (200, json.dumps(action)) if self.announced else (404, "")
        if path == _GCP:
            return 200, "TRUE" if self.announced else "FALSE"
        if path == _AZURE_NAME:
            return 200, "vm-0"
        if path == _AZURE_EVENTS:
            event = {"EventType": "Preempt", "Resources": ["vm-0"], "NotBefore": ""}
            return 200, json.dumps({"Events": [event] if self.announced else []})
        return 404, ""
