"""One request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.batching.scheduler import Candidate
from engine.batching.stopping import StopChecker
from engine.port import Mode
from splitwise_sched.types import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its tokens and its blocks.

    Attributes:
        arrival: orders sequences by age; smaller is older.
        tokens: the prompt, and all output so far (that of earlier runs included).
        num_computed: tokens with KV in the pool.
        blocks: the block table.
        num_reported_blocks: of them, already given out as ``BlocksReady``.
        preempted: waits for the blocks that were taken from it.
    """

    key: str
    request: Request
    mode: Mode
    arrival: int
    stop: StopChecker
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_reported_blocks: int = 0
    preempted: bool = False

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_token_ids, *self.request.emitted_token_ids]

    @property
    def num_output(self) -> int:
        """Output position of the token that comes next."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def candidate(self) -> Candidate:
        """Blocks of a prefill run stay where they are: a transfer may be reading the first of them already."""
        return Candidate(self.key, len(self.tokens), self.num_computed, len(self.blocks), self.mode is Mode.FULL)
