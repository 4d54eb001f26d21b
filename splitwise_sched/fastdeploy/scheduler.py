"""FastDeploy's splitwise scheduler, by its interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splitwise_sched.errors import ConfigError, InvalidRequest, SplitwiseError
from splitwise_sched.fastdeploy.admission import Offer
from splitwise_sched.fastdeploy.config import SplitWiseSchedulerConfig
from splitwise_sched.fastdeploy.messages import error_dict, request_of
from splitwise_sched.fastdeploy.objects import Classes
from splitwise_sched.fastdeploy.serving_side import FROM_DICT_ERRORS, ServingSide
from splitwise_sched.fastdeploy.user_side import UserSide
from splitwise_sched.types import Request, check_id


class SplitWiseScheduler:
    """One node: users put requests in and get results, an engine gets requests and puts results.

    ``start`` before anything is served; ``stop``, or ``with``, ends its threads, hands what it holds back to the queue
    and cancels what its users wait for. All methods may be called from any thread, and wait for Redis only in
    ``start``, ``stop`` and ``put_requests``.

    Attributes:
        scheduler: the users' side.
        infer: the engine's side.
    """

    def __init__(self, config: SplitWiseSchedulerConfig) -> None:
        config.check()
        self.config = config
        self._classes = Classes(config.request_class, config.output_class)
        self.scheduler = UserSide(config.settings(), config.nodeid)
        self.infer = ServingSide(config, self._classes)

    def __enter__(self) -> SplitWiseScheduler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, role: str, host: str, disaggregated: Any) -> None:
        """Connect, and register as an instance.

        Args:
            role: prefill, decode or mixed.
            host: address of this machine; two instances with the same one share KV by ``ipc``.
            disaggregated: what a peer must know to exchange KV with this instance, JSON values; ``transfer_protocol``
                in it lists what is offered. None on a mixed instance.

        Raises:
            ConfigError: an argument cannot work, or it was started already.
            StoreUnavailable, StoreUnsuitable: see Store.connect.
            IncompatibleInstance: instances of the topic have another model, or are mixed ones when this is not.
        """
        if self.scheduler.is_running:
            raise ConfigError("the scheduler was started already: stop() it first, or make another one")
        self.scheduler.start()
        try:
            self.infer.start(role, host, disaggregated)
        except SplitwiseError:
            self.scheduler.close()
            raise

    def stop(self) -> None:
        """Idempotent."""
        self.infer.close()
        self.scheduler.close()

    def reset_nodeid(self, nodeid: str) -> None:
        """Name this node otherwise, such as by its data-parallel rank. Raises ConfigError after ``start``."""
        if self.scheduler.is_running:
            raise ConfigError(f"the node is registered as {self.infer.nodeid!r}: call reset_nodeid before start")
        self.scheduler.nodeid = self.infer.nodeid = check_id("node", nodeid)

    # ---- for whoever has users -----------------------------------------------------------------------------------

    def put_requests(self, reqs: Sequence[Any]) -> list[tuple[Any, str | None]]:
        """Queue requests.

        Returns:
            [num_requests] the id of each, and None or why it was not taken; one that is refused harms no other.
        """
        answers: list[tuple[Any, str | None]] = []
        ready: list[tuple[int, str, Request]] = []
        for req in reqs:
            user_id = getattr(req, "request_id", None)
            try:
                ready.append((len(answers), str(user_id), self._open(req, user_id)))
            except InvalidRequest as exc:
                answers.append((user_id, str(exc)))
                continue
            answers.append((user_id, None))
            self._classes.saw_request(req)
        verdicts = self.scheduler.submit([(user_id, request) for _, user_id, request in ready]) if ready else []
        for (i, user_id, _), verdict in zip(ready, verdicts, strict=True):
            answers[i] = (user_id, verdict)
        return answers

    def _open(self, req: Any, user_id: object) -> Request:
        if user_id is None:
            raise InvalidRequest(f"{req!r:.80} has no request_id")
        config = self.config
        return request_of(req, model=config.model, max_model_len=config.max_model_len, ttl_s=config.ttl)

    def get_results(self, request_ids: Sequence[str] = ()) -> dict[str, list[Any]]:
        """Results that came since the last call: the first token first, none twice, the last ``finished``.

        A request that ends without its answer (expired, cancelled, given up, refused by its engine) gets a result with
        an ``error_code`` other than 200 and the reason in ``error_msg``.

        Args:
            request_ids: only those of these requests; the others stay for later calls.
        """
        taken = self.scheduler.take(request_ids)
        return {user_id: [self._result(user_id, data) for data in results] for user_id, results in taken.items()}

    def _result(self, user_id: str, data: dict[str, Any]) -> Any:
        output_class = self._classes.output
        try:
            return output_class.from_dict(data)
        except FROM_DICT_ERRORS as exc:
            why = f"{output_class.__name__}.from_dict does not take the result of {user_id}: {exc!r}"
        try:
            return output_class.from_dict(error_dict(user_id, why))
        except FROM_DICT_ERRORS as exc:
            raise ConfigError(f"{why}, nor an error result ({exc!r}): give output_class another class") from exc

    # ---- for whoever has an engine -------------------------------------------------------------------------------

    def get_requests(
        self,
        available_blocks: int,
        block_size: int,
        reserved_output_blocks: int,
        max_num_batched_tokens: int,
        batch: int = 1,
    ) -> list[Any]:
        """Requests to compute now, by what admission.py has for rules. On a decode instance none, unless configured."""
        chunked_prefill = None if self.infer.role == "decode" else self.config.chunked_prefill()
        return self.infer.get(
            Offer(available_blocks, block_size, reserved_output_blocks, max_num_batched_tokens, batch, chunked_prefill)
        )

    def put_results(self, results: Sequence[Any]) -> None:
        """Outputs for the users of these requests, by the request ids that ``get_requests`` gave."""
        for result in results:
            self._classes.saw_output(result)
        self.infer.put(results)
