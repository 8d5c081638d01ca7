"""Makes the snapshot of this package from a public list of offers.

    python -m launch.catalog.collected offers-2026-05-24.json

The list is JSON: `provider_id`, `gpu_model`, `vram_gb`, `interconnect`, `is_spot`,
`price_usd_hour` (of one GPU), `vcpu`, `ram_gb`, `collected_at`. It has neither regions nor the
number of GPUs of a node, so the snapshot assumes that data-centre providers rent nodes of 1, 2, 4
and 8 GPUs, one node at a time. Rows are left out whose caveats say that nobody pays their price:
estimates, the lowest bid of a marketplace, prices without the CPUs.
"""

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

from launch.catalog.gpus import gpu_of
from launch.catalog.offer import Offer
from launch.catalog.snapshot import write_snapshot

_NO_PRICE = re.compile(
    "estimated|live offer|cheapest host|across providers|may be stale|rarely available"
    "|billed separately",
    re.IGNORECASE,
)
_SOURCE = "public price pages of GPU clouds (MIT)"


def main() -> None:
    """Writes `snapshot-<date>.json` to the folder of this file."""
    rows: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # The oldest row dates the list, so that no price is older than the snapshot says.
    date = min(datetime.date.fromisoformat(row["collected_at"]) for row in rows)
    offers = sorted(
        (offer for row in rows for offer in _offers(row)),
        key=lambda o: (o.cloud, o.gpu, o.gpus_per_node, o.is_spot, o.usd_per_h),
    )
    # Sorted by price last and read backwards, the dict keeps the cheapest offer of each key.
    cheapest = {(o.cloud, o.gpu, o.gpus_per_node, o.is_spot): o for o in reversed(offers)}
    kept = sorted(cheapest.values(), key=offers.index)
    write_snapshot(Path(__file__).with_name(f"snapshot-{date}.json"), date, _SOURCE, kept)
    print(f"{len(kept)} offers of {len({o.cloud for o in kept})} providers, from {len(rows)} rows")


def _offers(row: dict[str, Any]) -> list[Offer]:
    name = gpu_of(f"{row['gpu_model']} {row.get('interconnect') or ''}", row["vram_gb"])
    # The name is None for consumer cards that the planner does not know.
    if name is None or _NO_PRICE.search(" ".join(row.get("caveats") or ())):
        return []
    return [
        Offer(
            cloud=row["provider_id"],
            region="",
            zone="",
            instance_type="",
            gpu=name,
            gpus_per_node=count,
            usd_per_h=round(row["price_usd_hour"] * count, 6),
            is_spot=row["is_spot"],
            vcpus=_times(row.get("vcpu"), count),
            memory_gib=_times(row.get("ram_gb"), count),
            max_nodes=1,
        )
        for count in (1, 2, 4, 8)
    ]


def _times(value: float | None, count: int) -> float | None:
    return None if value is None else value * count


if __name__ == "__main__":
    main()
