"""Run by SkyPilot's own Python: what its optimizer takes for each task, with a local catalog.

usage: SKY_RUNTIME_DIR=DIR python sky_optimum.py TASK.yaml...   prints one JSON line a task
"""

import json
import sys

import sky
from sky import check, clouds, optimizer
from sky.utils import common as sky_common


def optimum(path):
    with sky.Dag() as dag:
        task = sky.Task.from_yaml(path)
    dag.add(task) if task not in dag.tasks else None
    optimizer.Optimizer.optimize(dag, minimize=sky_common.OptimizeTarget.COST, quiet=True)
    best = task.best_resources
    return {
        "cloud": str(best.cloud).lower(),
        "region": best.region,
        "zone": best.zone,
        "accelerators": best.accelerators,
        "is_spot": best.use_spot,
        "usd_per_h": best.get_cost(3600),
    }


if __name__ == "__main__":
    enabled = [clouds.AWS(), clouds.GCP()]
    check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: enabled  # no credentials here
    for path in sys.argv[1:]:
        print(json.dumps(optimum(path)))
