"""Routes: worked out once, and anew when anything about the source is not as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kv_transfer import routes as routes_module
from kv_transfer.endpoint import RankEndpoint, endpoints_from_text, endpoints_to_text
from kv_transfer.errors import LayoutMismatch, ProtocolError
from kv_transfer.identity import ProcessIdentity
from kv_transfer.layout import KVLayout
from kv_transfer.placement import packed
from kv_transfer.protocol import WIRE_VERSION
from kv_transfer.routes import Routes

OWN = KVLayout("e", "m", "bfloat16", 32, 8, 128, 16, 512)


def instance(tp_size: int, stages: tuple[int, ...] = ()) -> list[RankEndpoint]:
    """As engines have it: K and V of each layer apart."""
    found = []
    for pp_rank in range(max(1, len(stages))):
        for tp_rank in range(tp_size):
            rank = replace(OWN, tp_size=tp_size, tp_rank=tp_rank, pp_layers=stages, pp_rank=pp_rank)
            order = ("layer", "plane", "block", "token", "head")
            rank = replace(rank, placement=packed(rank.shape, order, split=("layer", "plane")))
            process = ProcessIdentity("host", 7, 1)
            found.append(RankEndpoint("p", "h", 1, f"{rank.rank:032x}", process, rank, WIRE_VERSION, {"tcp": {}}))
    return found


def test_a_route_names_the_ranks_that_have_bytes_for_this_one_in_order() -> None:
    routes = Routes(replace(OWN, tp_size=4, tp_rank=1))
    found = routes.of(list(reversed(instance(2, (16, 16)))))
    assert [(endpoint.layout.rank, plan.src_rank, plan.dst_rank) for endpoint, plan in found] == [(0, 0, 1), (2, 2, 1)]


def test_a_second_look_costs_nothing_and_a_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = Routes(OWN)
    source = instance(8)
    first = routes.of(source)
    monkeypatch.setattr(routes_module, "plan_pair", None)
    assert routes.of(endpoints_from_text(endpoints_to_text(source))) is first
    with pytest.raises(TypeError):
        routes.of([replace(source[0], control_port=2), *source[1:]])


@pytest.mark.parametrize("which", [slice(0, 7), slice(0, 0)])
def test_some_ranks_are_not_all(which: slice) -> None:
    source = instance(8)
    with pytest.raises(ProtocolError, match="do not make up the 8 ranks"):
        Routes(OWN).of(source[which] + [source[7]] * 2)


def test_another_layout_or_version_of_any_rank_is_refused() -> None:
    source = instance(2)
    with pytest.raises(ProtocolError, match="install the same release"):
        Routes(OWN).of([source[0], replace(source[1], wire_version=1)])
    with pytest.raises(LayoutMismatch, match="model"):
        Routes(OWN).of([source[0], replace(source[1], layout=replace(source[1].layout, model="other"))])


def test_no_more_than_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "MAX_REMEMBERED", 2)
    routes = Routes(OWN)
    for number in range(5):
        routes.of([replace(instance(1)[0], nonce=f"{number + 100:032x}")])
    assert len(routes._known) == 2
