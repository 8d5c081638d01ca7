"""A policy that knows the rates of a memoryless market, but not the future.

On such a market no policy without foresight is cheaper in the mean, except for rounding in its
plan. What it pays above the oracle is therefore the price of not knowing the future, which no
policy can avoid.
"""

import math
from collections.abc import Callable, Sequence

from launch.simulation.dynamic_program import Model, make_plan
from launch.simulation.policies import can_risk, on_demand
from launch.simulation.simulate import Place, Terms, View


class Informed:
    """Follows the best plan for one zone, whose spot comes and goes at known rates.

    Args:
        terms: Terms of the job.
        up_h: Mean hours for which spot is available.
        down_h: Mean hours for which spot is not available.
        price: Price of spot, as a share of the on-demand price.
    """

    def __init__(self, terms: Terms, up_h: float, down_h: float, price: float) -> None:
        self._terms = terms
        self._plan = make_plan(
            Model(
                deadline=terms.deadline,
                slack=terms.deadline - terms.work,
                restart=terms.restart,
                interval=terms.interval,
                price=price,
                move=0.0,
                widths=(math.inf,),
                leave=(1 - math.exp(-terms.gap_h / up_h),),
                come=(1 - math.exp(-terms.gap_h / down_h),),
                replaced=0.0,
            )
        )

    def decide(self, view: View) -> Sequence[Place]:
        """See `Policy`."""
        place, spot = view.place, Place(0, True)
        # Once a loss in the next tick would miss the deadline, only on-demand is safe.
        if not can_risk(self._terms, view):
            return [on_demand(self._terms, view)]
        if place == spot:
            return [spot]
        at = view.time_left, 0, view.time_left - view.work_left - view.warming
        if place is None:
            return [spot] if self._plan.wait(*at) else [spot, on_demand(self._terms, view)]
        stay = [] if self._plan.pause(*at) else [place]
        return [spot, *stay] if self._plan.take(*at) else stay


def informed(up_h: float, down_h: float, price: float) -> Callable[[Terms], Informed]:
    """Returns a function that makes such policies; see `Informed`."""
    return lambda terms: Informed(terms, up_h, down_h, price)
