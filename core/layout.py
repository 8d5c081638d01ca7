"""Names of files and folders that one program writes and another one reads."""

# Run directory
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
DATA = "data.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SUPERVISOR_EVENTS = "supervisor.jsonl"
SAMPLES = "samples.jsonl"
STATUS = "status.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
EXPORT = "export"
COMPRESSED = "compressed"
PIPELINE = "pipeline.json"

# Checkpoint; its tensors are named in `parallel/optimizer_state.py`
STEP = "step-"  # prefix of the folder's name
LATEST = "LATEST"
TRAINER_STATE = "trainer.json"
ASSETS = "huggingface"
STORED_NAMES = "stored_names.json"

# Any folder that one stage hands to the next
MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
COMPRESSION = "compression.json"  # only in compressed artifacts

# Folder of a rank, which its supervisor reads
HEARTBEAT = "heartbeat"
STACK = "stack.txt"
ERROR = "error.txt"
STOP_REASON = "stop_reason.txt"
