"""The same loop as one instance of many: python toy_loop_pd.py prefill|decode|mixed [host:port] [transports]"""

import signal
import sys
import threading
from dataclasses import dataclass

from toy_model import BLOCK_SIZE, HEAD_DIM, KV_SHAPE, NUM_BLOCKS, ToyModel

from kv_transfer import (
    KVLayout,
    KVPool,
    KVTransferError,
    Messenger,
    Received,
    Sent,
    TransferFailed,
    TransferOptions,
    endpoints_from_text,
    endpoints_to_text,
    parse_protocols,
)
from splitwise_sched import (
    DecodeAssigned,
    Dropped,
    FinishReason,
    Instance,
    Output,
    PrefillAssigned,
    Registration,
    Request,
    Role,
    SchedulerSettings,
)

LAYOUT = KVLayout(
    engine="toy",
    model="toy-1",
    dtype="uint8",
    num_layers=1,
    num_kv_heads=1,
    head_dim=HEAD_DIM,
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
)
DEADLINE_S = 900.0  # of a transfer; requests expire after scheduler_ttl, which is the same


@dataclass
class Sequence:
    request: Request
    epoch: int
    blocks: list[int]
    tokens: list[int]  # of the prompt, then of the answer
    is_dropped: bool = False

    def output(self) -> Output:
        """Its newest token."""
        num_answered = len(self.tokens) - len(self.request.prompt_token_ids)
        is_last = num_answered == self.request.sampling.max_tokens
        end = FinishReason.LENGTH if is_last else None
        return Output(self.request.request_id, self.epoch, num_answered - 1, (self.tokens[-1],), finish_reason=end)


def serve(model: ToyModel, instance: Instance, messenger: Messenger, wake: threading.Event) -> None:
    free = list(range(NUM_BLOCKS))
    waiting: dict[str, PrefillAssigned | DecodeAssigned] = {}
    running: dict[str, Sequence] = {}
    moving: dict[str, Sequence] = {}  # their blocks are the messenger's, until it reports their transfer's end

    def drop(key: str) -> None:
        waiting.pop(key, None)
        if key in running:
            free.extend(running.pop(key).blocks)
        if key in moving:
            moving[key].is_dropped = True
            messenger.abort(key, "it was dropped")

    while moving or not instance.is_drained:
        outputs = []
        for event in instance.poll(room=4 - len(waiting), load={"running": len(running)}):
            if isinstance(event, PrefillAssigned | DecodeAssigned):
                waiting[event.key] = event
            elif isinstance(event, Dropped):
                drop(event.key)
            else:  # LeaseLost: others have it all
                for key in [*waiting, *running, *moving]:
                    drop(key)
                if event.new_instance_id is None:
                    sys.exit(event.reason)

        for end in messenger.poll():
            key, sequence = end.transfer_id, moving.pop(end.transfer_id)
            run = (sequence.request.request_id, sequence.epoch)
            if isinstance(end, Received) and not sequence.is_dropped:
                sequence.tokens.append(int.from_bytes(end.aux, "little"))
                instance.step(*run, {"lane": end.stats.lane, "kv_bytes": end.stats.num_bytes})
                outputs.append(sequence.output())  # prefill has sent it too, unless it died before it could
                running[key] = sequence
                continue
            free += sequence.blocks
            if isinstance(end, Sent):
                instance.release(*run)  # decode has it
            elif isinstance(end, TransferFailed) and not sequence.is_dropped:
                instance.give_back(*run, end.reason, retry=True, pair_failed=True)

        for key, work in list(waiting.items()):
            request = work.request
            needed = -(-(len(request.prompt_token_ids) + request.sampling.max_tokens) // BLOCK_SIZE)
            if needed > NUM_BLOCKS:
                del waiting[key]
                instance.give_back(request.request_id, work.epoch, f"it takes {needed} blocks", retry=False)
                continue
            if needed > len(free):
                break
            del waiting[key]
            blocks = [free.pop() for _ in range(needed)]
            sequence = Sequence(request, work.epoch, blocks, list(request.input_token_ids))
            input_blocks = blocks[: -(-request.num_input_tokens // BLOCK_SIZE)]
            deadline_s = request.timeout_s or DEADLINE_S
            if isinstance(work, DecodeAssigned):
                try:
                    source = endpoints_from_text(work.prefill_fields.get("kv_endpoints", ""))
                    messenger.open_receive(key, source, input_blocks, deadline_s=deadline_s)
                    moving[key] = sequence
                except KVTransferError as exc:
                    free += blocks
                    instance.give_back(request.request_id, work.epoch, str(exc), retry=True, pair_failed=True)
                continue
            sequence.tokens.append(model.forward(sequence.tokens, 0, blocks))
            outputs.append(sequence.output())
            if work.decode_instance == instance.instance_id:
                instance.step(request.request_id, work.epoch, {"lane": "local"})
                running[key] = sequence
            else:
                messenger.open_send(key, num_blocks=len(input_blocks), deadline_s=deadline_s)
                messenger.send_blocks(key, 0, input_blocks)
                messenger.finish_send(key, sequence.tokens[-1].to_bytes(4, "little"))
                moving[key] = sequence

        for key, sequence in list(running.items()):
            num_answered = len(sequence.tokens) - len(sequence.request.prompt_token_ids)
            if num_answered < sequence.request.sampling.max_tokens:
                sequence.tokens.append(model.forward(sequence.tokens[-1:], len(sequence.tokens) - 1, sequence.blocks))
                outputs.append(sequence.output())
            else:
                free += running.pop(key).blocks

        instance.publish(outputs)
        if not running:
            wake.wait(0.1)
        wake.clear()


def main(role: str, address: str = "127.0.0.1:6379", transports: str = "ipc,tcp") -> None:
    host, _, port = address.rpartition(":")
    settings = SchedulerSettings(scheduler_host=host, scheduler_port=int(port), scheduler_topic="toy")
    options = TransferOptions(protocols=parse_protocols(transports))
    wake = threading.Event()
    with KVPool.allocate(LAYOUT) as pool, Messenger(pool, options, name=f"toy-{role}", on_event=wake.set) as messenger:
        registration = Registration(
            name=f"toy-{role}",
            role=Role(role),
            model="toy",
            must_match={f"kv.{name}": value for name, value in LAYOUT.compatibility().items()},
            capacity_tokens=NUM_BLOCKS * BLOCK_SIZE,
            capacity_requests=256,
            block_size=BLOCK_SIZE,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            details={"kv_endpoints": endpoints_to_text([messenger.endpoint])},
        )
        with Instance(settings, registration, on_event=wake.set) as instance:
            signal.signal(signal.SIGTERM, lambda *_: instance.drain())  # Ctrl-C ends it now: its work goes back
            print(instance.instance_id, "serves", flush=True)
            serve(ToyModel(pool.as_array().reshape(KV_SHAPE)), instance, messenger, wake)


if __name__ == "__main__":
    main(*sys.argv[1:])
