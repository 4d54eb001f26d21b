"""Which source ranks a destination rank fetches from, and by which plan; worked out once for each source instance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import ProtocolError
from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.pairing import grid_of, source_ranks
from kv_transfer.plan import PairPlan, plan_pair
from kv_transfer.protocol import WIRE_VERSION

MAX_REMEMBERED = 1024

Route = tuple[tuple[RankEndpoint, PairPlan], ...]


class Routes:
    """Of one destination rank."""

    def __init__(self, own: KVLayout) -> None:
        self._own = own
        self._known: OrderedDict[tuple[str, ...], tuple[tuple[RankEndpoint, ...], Route]] = OrderedDict()

    def of(self, source: Sequence[RankEndpoint]) -> Route:
        """The ranks that this one has to do with, in order.

        Args:
            source: all ranks of the instance, in any order.
        Raises:
            ProtocolError: they are not all ranks of one instance, or of another wire version.
            LayoutMismatch: blocks do not mean the same.
        """
        endpoints = tuple(source)
        key = tuple(endpoint.nonce for endpoint in endpoints)
        known = self._known.get(key)
        if known is not None and known[0] == endpoints:
            return known[1]
        route = self._find(endpoints)
        self._known[key] = endpoints, route
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return route

    def _find(self, source: Sequence[RankEndpoint]) -> Route:
        first = source[0].layout
        ranks = {e.layout.rank: e for e in source if grid_of(e.layout) == grid_of(first)}
        if len(source) != first.num_ranks or len(ranks) != first.num_ranks:
            raise ProtocolError(
                f"{len(source)} endpoints do not make up the {first.num_ranks} ranks of {source[0].name}"
            )
        for endpoint in source:
            if endpoint.wire_version != WIRE_VERSION:
                raise ProtocolError(
                    f"the wire versions differ: {WIRE_VERSION} here and {endpoint.wire_version} at "
                    f"{endpoint.describe()}; install the same release on both"
                )
            # All of them before any is connected to: an incompatible instance costs nothing.
            check_compatible(self._own, endpoint.layout)
        numbers = source_ranks(first, self._own)
        return tuple((ranks[number], plan_pair(ranks[number].layout, self._own)) for number in numbers)
