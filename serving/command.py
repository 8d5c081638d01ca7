"""What `python -m serving` is set by, for all who compose it. Imports no torch."""

from core.settings.command import Command
from serving.config import ServingConfig

_EXAMPLES = """
python -m serving artifact=runs/demo/export
python -m serving artifact=runs/demo/compressed/int8_weight_only/torchao port=8080
python -m serving artifact=demo keys=keys.json admin_port=8001 log.requests=requests.jsonl
python -m serving key create NAME [requests_per_minute=60 ...]    also: key list, key revoke NAME
"""

_NOTES = """
SIGTERM lets what runs end; a second one ends it at once.
Exit codes: 0 stopped when told to; 2 refused; 1 failed.
"""

SERVING = Command(
    program="python -m serving",
    about="Serve a model with OpenAI's API.",
    schema=ServingConfig,
    root="serving",
    examples=_EXAMPLES,
    notes=_NOTES,
)
