"""`python -m trainer`: composes the configuration with Hydra, then launches it."""

import os
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from monitoring.errors import ConfigError, ExitCode
from trainer.cli import CONFIG_DIR, explain, help_text
from trainer.config import register_schemas


def _run(tree: DictConfig) -> None:
    config: Any = OmegaConf.to_object(tree)
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:  # each job of a sweep is a run of its own, named by what it changes
        config.run.name += f"/{HydraConfig.get().job.override_dirname}"
        config.run.dir += f"/{HydraConfig.get().job.override_dirname}"
    from trainer.launching import launch

    code = launch(config)
    if code != ExitCode.FINISHED or not sweep:
        sys.exit(code)


def main() -> None:
    """Entry point; ends the process with the exit code of the run."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(sys.argv[1:]))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the one line below is all there is
    register_schemas()
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="trainer")(_run)()
    except ConfigError as e:
        sys.exit(_refuse(str(e)))
    except (HydraException, OmegaConfBaseException) as e:
        sys.exit(_refuse(explain(e)))


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return ExitCode.BAD_CONFIG


if __name__ == "__main__":
    main()
