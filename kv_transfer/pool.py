"""What a messenger and its transports ask of a KV pool, whoever owns its memory."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kv_transfer.layout import KVLayout
from kv_transfer.plan import IntArray, PairPlan
from kv_transfer.tensors import Memory
from kv_transfer.views import BlockView


class BlockPool(ABC):
    """The blocks of one rank. Its owner keeps it until the messenger is closed."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout

    @property
    def is_on_device(self) -> bool:
        """Whether it is in the memory of a GPU; decides which transport ``ipc`` stands for."""
        return False

    @property
    def shared_file(self) -> tuple[int, bytes] | None:
        """Descriptor and nonce of the file that peers on this host may map; None where there is none."""
        return None

    @property
    def memory(self) -> tuple[Memory, ...]:
        """Where each region is; empty for a pool that does not tell."""
        return ()

    def before_send(self, block_ids: IntArray) -> None:
        """Peers are about to be told that what the engine has begun to compute makes these blocks complete.

        Called in the engine's thread, for every ``send_blocks``. For engines whose computation goes on after their call
        has returned: whoever reads the blocks must come after it.
        """

    def before_receive(self) -> None:
        """Blocks are about to be written from outside; the engine may still use them for what it has begun.

        Called in the engine's thread, for every ``open_receive``.
        """

    @abstractmethod
    def view(self, plan: PairPlan, side: str) -> BlockView:
        """What a plan moves out of this pool (``side`` "src") or into it ("dst"); for one thread."""
