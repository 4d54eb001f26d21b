"""What a caller may ask of a messenger, and what he is told when it makes no sense."""

from __future__ import annotations

import pytest

from kv_transfer.errors import InvalidTransfer
from kv_transfer.tickets import NOT_WANTED, ReceiveTicket, SendTicket, TicketBook


def test_blocks_are_given_once_and_all_of_them_before_the_end() -> None:
    ticket = SendTicket("r@1", 5)
    assert ticket.take(2, [7, 8, 9], 10).tolist() == [7, 8, 9]
    with pytest.raises(InvalidTransfer, match="2 blocks missing"):
        ticket.finish()
    with pytest.raises(InvalidTransfer, match="given before"):
        ticket.take(1, [1, 2], 10)
    ticket.take(0, [1, 2], 10)
    ticket.finish()
    with pytest.raises(InvalidTransfer, match="finished twice"):
        ticket.finish()
    with pytest.raises(InvalidTransfer, match="given before"):
        ticket.take(0, [1], 10)


@pytest.mark.parametrize(("first", "block_ids"), [(-1, [1]), (4, [1, 2]), (0, []), (0, [10]), (0, [-1]), (9, [1])])
def test_blocks_outside_the_transfer_or_the_pool_are_refused(first: int, block_ids: list[int]) -> None:
    with pytest.raises(InvalidTransfer):
        SendTicket("r@1", 5).take(first, block_ids, 10)


@pytest.mark.parametrize("block_ids", [[], [1, 1], [10], [-2], [-1, 10], [-1, 1, 1]])
def test_a_destination_names_blocks_that_exist_once_each(block_ids: list[int]) -> None:
    with pytest.raises(InvalidTransfer):
        ReceiveTicket("r@1", block_ids, 10)


def test_blocks_that_a_destination_has_already_are_left_out_of_its_list() -> None:
    assert ReceiveTicket("r@1", [NOT_WANTED, NOT_WANTED, 9, 3], 10).block_ids.tolist() == [-1, -1, 9, 3]


@pytest.mark.parametrize("num_blocks", [0, -1, 2**40])
def test_a_transfer_has_some_blocks(num_blocks: int) -> None:
    with pytest.raises(InvalidTransfer):
        SendTicket("r@1", num_blocks)


def test_an_id_is_open_once_until_its_end_was_polled() -> None:
    book = TicketBook(limit=2)
    book.open_send(SendTicket("r@1", 1), 1.0)
    with pytest.raises(InvalidTransfer, match="opened before"):
        book.open_receive(ReceiveTicket("r@1", [1], 10), 1.0)
    book.close("r@1")
    with pytest.raises(InvalidTransfer, match="not open for sending"):
        book.send("r@1")
    book.open_receive(ReceiveTicket("r@1", [1], 10), 1.0)
    assert book.open_ids() == ["r@1"]


def test_there_is_a_limit_each_way() -> None:
    book = TicketBook(limit=1)
    book.open_send(SendTicket("a", 1), 1.0)
    with pytest.raises(InvalidTransfer, match="max_inflight"):
        book.open_send(SendTicket("b", 1), 1.0)
    book.open_receive(ReceiveTicket("c", [1], 10), 1.0)


@pytest.mark.parametrize("transfer_id", ["", "x" * 201, "a\nb"])
def test_ids_are_short_and_printable(transfer_id: str) -> None:
    with pytest.raises(InvalidTransfer):
        TicketBook(9).open_send(SendTicket(transfer_id, 1), 1.0)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_deadline_is_a_finite_time_from_now(deadline_s: float) -> None:
    with pytest.raises(InvalidTransfer):
        TicketBook(9).open_send(SendTicket("a", 1), deadline_s)
