"""The least that a job can cost on a market, for one who knows all that is to come."""

import numpy as np

from core.errors import ConfigError
from launch.simulation.market import Floats, Market
from launch.simulation.simulate import Job, Terms


def oracle_cost_usd(market: Market, job: Job, first_tick: int = 0) -> float:
    """The cheapest way to finish in time under the rules of `launch.simulation.simulate`; exact.

    Dynamic programming from the deadline back, over (tick, place, progress). It needs to know
    neither how much is saved nor how long a start still takes, for whoever knows the future

    - starts on spot only where it lasts for the whole start: else the start is paid for nothing;
    - is preempted only with all progress saved: else it would have left one tick earlier, with no
      less progress, for less. (More progress is never worse: the same moves keep it ahead.)

    Args:
        market: It has to last until the job's deadline.
        job: What to compute.
        first_tick: Where in the market the job begins.

    Returns:
        The cost; always finite, as on-demand nodes can be had from beginning to end.

    Raises:
        ConfigError: The market ends before the deadline.
    """
    terms = Terms.of(job, market)
    if first_tick + terms.deadline > market.num_ticks:
        raise ConfigError("first_tick", first_tick, "the market ends too early", "start earlier")
    region_names = sorted(set(market.regions))
    usd, regions = _places(market, terms, first_tick, region_names)
    num_regions = len(region_names)
    firsts = np.searchsorted(regions, np.arange(num_regions))  # of each region's places
    # Rows: where the checkpoint is (the last: nowhere yet); columns: where the job starts.
    egress = np.full((num_regions + 1, num_regions, 1), terms.egress_usd)
    egress[np.arange(num_regions), np.arange(num_regions)] = 0.0
    egress[num_regions] = 0.0

    work, restart, deadline = terms.work, terms.restart, terms.deadline
    is_saved = np.arange(work + 1) % terms.interval == 0
    is_saved[work] = True
    unfinished = np.append(np.full(work, np.inf), 0.0)  # (W + 1)
    idle = np.tile(unfinished, (num_regions + 1, 1))  # cost to go from nowhere
    # Cost to go from within each place, started; `restart` + 1 ticks, the next first.
    ahead = [np.tile(unfinished, (len(regions), 1))] * (restart + 1)
    for tick in reversed(range(deadline)):
        stay = np.empty_like(ahead[0])  # (P, W + 1); not possible where usd is inf
        stay[:, :-1] = ahead[0][:, 1:] + usd[tick][:, None]
        stay[:, -1] = 0.0
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
    """What a tick costs in each place, inf where there is no spot (T, P), and the places' regions.

    Spot of every zone, and on-demand once a region and price series; sorted by region.
    """
    window = slice(first_tick, first_tick + terms.deadline)
    tick_h = terms.gap_h * terms.gang_size
    is_up = market.nodes[window] >= terms.gang_size
    spot = np.where(is_up, market.spot_usd_per_h[window] * tick_h, np.inf)
    on_demand = market.on_demand_usd_per_h[window] * tick_h
    found: dict[tuple[int, bytes], Floats] = {}
    for zone, name in enumerate(market.regions):
        region = region_names.index(name)
        for series in (spot[:, zone], on_demand[:, zone]):
            found.setdefault((region, series.tobytes()), series)
    keys = sorted(found, key=lambda key: key[0])
    return np.stack([found[key] for key in keys], 1), [region for region, _ in keys]
