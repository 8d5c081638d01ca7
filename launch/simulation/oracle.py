"""The least possible cost of a job on a market, with full knowledge of the future."""

import numpy as np

from core.errors import ConfigError
from launch.simulation.market import Floats, Market
from launch.simulation.simulate import Job, Terms


def oracle_cost_usd(market: Market, job: Job, first_tick: int = 0) -> float:
    """Returns the exact least cost of finishing in time, by the rules of `simulate`.

    Dynamic programming runs from the deadline backwards over (tick, place, progress). The state
    needs neither the saved progress nor the rest of a start, since an optimal policy that knows the
    future

    - starts on spot only if it lasts for the whole start: otherwise the start is paid for nothing;
    - is preempted only with all progress saved: otherwise it would leave one tick earlier, with no
      less progress and at a lower cost. (More progress is never worse: the same moves keep it
      ahead.)

    Args:
        market: Market that lasts at least until the job's deadline.
        job: Job to place.
        first_tick: Tick of the market at which the job begins.

    Returns:
        The cost in dollars; always finite, since on-demand nodes are always available.

    Raises:
        ConfigError: The market ends before the deadline.
    """
    terms = Terms.of(job, market)
    if first_tick + terms.deadline > market.num_ticks:
        raise ConfigError("first_tick", first_tick, "the market ends too early", "start earlier")
    region_names = sorted(set(market.regions))
    usd, regions = _places(market, terms, first_tick, region_names)
    num_regions = len(region_names)
    firsts = np.searchsorted(regions, np.arange(num_regions))  # first place of each region
    # Rows: region of the checkpoint (the last row: none yet); columns: region of the start.
    egress = np.full((num_regions + 1, num_regions, 1), terms.egress_usd)
    egress[np.arange(num_regions), np.arange(num_regions)] = 0.0
    egress[num_regions] = 0.0

    work, restart, deadline = terms.work, terms.restart, terms.deadline
    is_saved = np.arange(work + 1) % terms.interval == 0
    is_saved[work] = True
    unfinished = np.append(np.full(work, np.inf), 0.0)  # (W + 1)
    # Cost to finish from no place, by region of the checkpoint (regions + 1, W + 1).
    idle = np.tile(unfinished, (num_regions + 1, 1))
    # Cost to finish from within each place after its start (P, W + 1), for the next `restart` + 1
    # ticks, the nearest first: a start looks that far ahead.
    ahead = [np.tile(unfinished, (len(regions), 1))] * (restart + 1)
    for tick in reversed(range(deadline)):
        stay = np.empty_like(ahead[0])  # (P, W + 1); infinite where usd is, without spot
        stay[:, :-1] = ahead[0][:, 1:] + usd[tick][:, None]
        stay[:, -1] = 0.0
        # A start at this tick pays for `restart` ticks in its place and then stands within it.
        if tick + restart <= deadline:
            started = ahead[restart - 1] if restart else stay
            start = started + usd[tick : tick + restart].sum(0)[:, None]
            best = np.minimum.reduceat(start, firsts, axis=0)  # (regions, W + 1)
            idle = np.minimum(idle, (egress + best).min(1))
        leave = idle[regions]
        preempted = np.where(is_saved, leave, np.inf)
        is_up = np.isfinite(usd[tick])[:, None]
        ahead = [np.where(is_up, np.minimum(stay, leave), preempted), *ahead[:-1]]
    return float(idle[num_regions, 0])


def _places(
    market: Market, terms: Terms, first_tick: int, region_names: list[str]
) -> tuple[Floats, list[int]]:
    """Returns the cost of a tick in each place (T, P), and the regions of the places (P).

    The cost is infinite while a zone has no spot. Places are the spot of every zone, and on-demand
    nodes once for each region and series of prices, sorted by region.
    """
    window = slice(first_tick, first_tick + terms.deadline)
    tick_h = terms.gap_h * terms.gang_size
    is_up = market.nodes[window] >= terms.gang_size
    spot = np.where(is_up, market.spot_usd_per_h[window] * tick_h, np.inf)
    on_demand = market.on_demand_usd_per_h[window] * tick_h
    # Places of a region with equal costs at all ticks are one place: the search is shorter.
    found: dict[tuple[int, bytes], Floats] = {}
    for zone, name in enumerate(market.regions):
        region = region_names.index(name)
        for series in (spot[:, zone], on_demand[:, zone]):
            found.setdefault((region, series.tobytes()), series)
    keys = sorted(found, key=lambda key: key[0])
    return np.stack([found[key] for key in keys], 1), [region for region, _ in keys]
