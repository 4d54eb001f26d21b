"""What prefill tells decode beside the KV: the first token, and what it measured. Rides with the last blocks."""

from __future__ import annotations

import json
from dataclasses import dataclass

from engine.errors import MalformedHandover
from engine.port import TokensOut
from splitwise_sched.errors import SplitwiseError
from splitwise_sched.outputs import decode_output, encode_output
from splitwise_sched.types import Output

MAX_AUX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Handover:
    """
    Attributes:
        num_input_tokens: that the KV was computed for.
        prefill_s: from claim to first token.
    """

    first: TokensOut
    num_input_tokens: int
    prefill_s: float

    def encode(self, request_id: str, epoch: int) -> bytes:
        output = Output(request_id, epoch, self.first.index, self.first.token_ids, self.first.logprobs)
        text = {"first": encode_output(output), "input_tokens": self.num_input_tokens, "prefill_s": self.prefill_s}
        return json.dumps(text).encode()

    @classmethod
    def decode(cls, aux: bytes, key: str, request_id: str, num_input_tokens: int) -> Handover:
        """Raises MalformedHandover; nothing in ``aux`` is trusted."""
        try:
            if len(aux) > MAX_AUX_BYTES:
                raise ValueError(f"{len(aux)} bytes")
            raw = json.loads(aux)
            if not isinstance(raw["first"], str):
                raise ValueError("its first token is no text")
            output = decode_output(request_id, raw["first"])
            if not isinstance(output, Output) or len(output.token_ids) != 1:
                raise ValueError("not one first token")
            if raw["input_tokens"] != num_input_tokens:
                raise ValueError(f"KV of {raw['input_tokens']} input tokens, {num_input_tokens} are asked for")
            first = TokensOut(key, output.index, output.token_ids, output.logprobs)
            return cls(first, num_input_tokens, float(raw["prefill_s"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, SplitwiseError) as exc:
            raise MalformedHandover(f"hand-over of {request_id} is not usable: {exc}") from exc
