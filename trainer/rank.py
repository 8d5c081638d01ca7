"""`python -m trainer.rank FILE`: one rank of a run that `python -m trainer` has launched.

FILE holds the settings of the run; it comes from `trainer.launching`, never from a user.
"""

import sys
from pathlib import Path

from core.settings.stored import from_yaml
from trainer.command import TRAINER
from trainer.launching import run_rank

if __name__ == "__main__":
    sys.exit(run_rank(*from_yaml(TRAINER, Path(sys.argv[1]).read_text(encoding="utf-8"))))
