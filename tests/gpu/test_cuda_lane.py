"""The conformance suite and the faults on cuda_ipc between processes that share a GPU: the very tests of all lanes."""

from __future__ import annotations

import pytest

from kv_transfer import TransferOptions
from tests.cuda_twin import TwinRuntime
from tests.integration.kv_instances import lane_options
from tests.integration.kv_memory import cuda_runtime
from tests.integration.test_kv_conformance import (  # noqa: F401
    test_a_block_zeroed_in_one_layer_on_its_way_is_seen_by_the_comparison,
    test_a_cached_prefix_of_another_process_stays_as_it_is,
    test_an_abort_by_either_side_ends_both_and_leaves_other_transfers_alone,
    test_blocks_larger_than_a_chunk_and_than_a_socket_buffer_arrive,
    test_blocks_move_while_later_ones_are_still_computed,
    test_blocks_that_decode_has_already_are_not_sent,
    test_chunks_arrive_before_and_after_the_reservation,
    test_closing_a_messenger_fails_what_is_open_on_both_sides,
    test_every_byte_arrives_and_no_other_byte_changes,
    test_layouts_of_all_kinds_exchange_blocks,
    test_the_largest_auxiliary_payload_arrives_with_the_last_chunk,
    test_two_hundred_transfers_at_a_time_each_get_their_own_bytes,
)
from tests.integration.test_kv_faults import (  # noqa: F401
    test_a_destination_killed_in_mid_transfer_fails_it_and_the_next_destination_works,
    test_a_link_that_falls_silent_fails_its_transfers_on_both_sides_and_no_others,
    test_a_peer_killed_while_bytes_flow_fails_the_transfer,
    test_a_peer_that_stands_still_is_taken_for_gone_by_the_other_side,
    test_a_source_killed_in_mid_transfer_fails_it_and_the_next_source_works,
    test_a_source_that_was_stopped_while_bytes_flowed_changes_no_byte_after_the_abort,
    test_blocks_reused_while_their_reader_is_stopped_are_not_taken_for_the_transfers,
    test_nothing_is_written_after_an_abort_where_blocks_are_packed_and_unpacked,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def only_cuda(request: pytest.FixtureRequest) -> None:
    """Tests that bring their own lanes: of these, the one that is meant."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("lane", "cuda_ipc") != "cuda_ipc":
        pytest.skip("another lane, which has its turn elsewhere")


@pytest.fixture
def options() -> TransferOptions:
    return lane_options("cuda_ipc")


def test_these_tests_run_on_a_device_and_not_on_its_twin() -> None:
    assert not isinstance(cuda_runtime(), TwinRuntime)
