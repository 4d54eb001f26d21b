"""Loops written for FastDeploy's scheduler interface, served by this scheduler."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from splitwise_sched.errors import ConfigError, IncompatibleInstance, StoreUnavailable
from splitwise_sched.fastdeploy import Request, RequestOutput, SplitWiseScheduler
from tests.integration.fastdeploy_loop import (
    EngineLoop,
    announced,
    config_for,
    read_all,
    request,
    tokens_of,
    toy_answer,
)

HOSTS = {"prefill": "10.0.0.1", "decode": "10.0.0.1", "mixed": "10.0.0.1"}


@contextlib.contextmanager
def node(server: Any, topic: str, role: str, wires: dict[int, queue.Queue], **options: Any) -> Iterator[EngineLoop]:
    host, port = options.pop("node_host", HOSTS[role]), options.pop("wire_port", 0)
    with SplitWiseScheduler(config_for(server, topic, **options)) as scheduler:
        scheduler.start(role, host, announced(role, host, port))
        with EngineLoop(scheduler, role, wires, port) as loop:
            yield loop


def ask(scheduler: SplitWiseScheduler, reqs: list[Any]) -> None:
    assert scheduler.put_requests(reqs) == [(r.request_id, None) for r in reqs]
    results = read_all(scheduler, [r.request_id for r in reqs])
    for r in reqs:
        assert tokens_of(results[r.request_id]) == toy_answer(r.prompt_token_ids, r.max_tokens), r.request_id


def test_prefill_and_decode_serve_what_either_of_them_is_asked(redis_server, topic):
    wires: dict[int, queue.Queue] = {}
    with (
        node(redis_server, topic, "prefill", wires) as prefill,
        node(redis_server, topic, "decode", wires, wire_port=8001) as decode,
        node(redis_server, topic, "decode", wires, wire_port=8002),
    ):
        ask(prefill.scheduler, [request(f"from-prefill-{i}", max_tokens=1 + i % 9) for i in range(30) if i % 9])
        ask(decode.scheduler, [request(f"from-decode-{i}", max_tokens=12) for i in range(30)])
        assert decode.seen == []
        assert {t.disaggregate_info["cache_info"]["ipc"]["port"] for t in prefill.seen} == {8001, 8002}


def test_mixed_node_keeps_its_requests_and_hands_on_all_that_they_say(redis_server, topic):
    with node(redis_server, topic, "mixed", {}) as mixed:
        sent = request("r0", tools=[{"name": "look", "args": [1, None, 2.5]}], user="ä")
        ask(mixed.scheduler, [sent, *(request(f"x{i}") for i in range(40))])
        got = next(t for t in mixed.seen if t.request_id == "r0")
        assert got == sent and got.disaggregate_info is None


@pytest.mark.parametrize(("decode_host", "protocol"), [("10.0.0.1", "ipc"), ("10.0.0.2", "rdma")])
def test_request_names_the_decode_node_and_the_protocol_by_host(redis_server, topic, decode_host, protocol):
    wires: dict[int, queue.Queue] = {}
    with (
        node(redis_server, topic, "prefill", wires) as prefill,
        node(redis_server, topic, "decode", wires, wire_port=9000, node_host=decode_host),
    ):
        ask(prefill.scheduler, [request("r0")])
        info = announced("decode", decode_host, 9000)
        assert info is not None
        assert prefill.seen[0].disaggregate_info == {**info, "transfer_protocol": protocol}


def test_decode_hands_out_requests_when_it_is_told_to_with_the_prefill_node_in_them(redis_server, topic):
    with (
        node(redis_server, topic, "prefill", {}) as prefill,
        node(redis_server, topic, "decode", {}, decode_gets_requests=True) as decode,
    ):
        ask(prefill.scheduler, [request(f"r{i}") for i in range(20)])
        assert {t.disaggregate_info["role"] for t in decode.seen} == {"prefill"}
        assert {t.disaggregate_info["transfer_protocol"] for t in decode.seen} == {"ipc"}


def test_ids_may_be_any_text_and_one_that_is_refused_harms_no_other(redis_server, topic):
    odd = ["a#1", "a#0#node-0", "a", "b#", "#", "ü/ 中\n", "fd:x", "fdh:y", "x" * 500, "x" * 501, "a:b", "{t}*"]
    with node(redis_server, topic, "mixed", {}) as mixed:
        reqs = [request(user_id) for user_id in odd]
        bad = [request(""), request("z" * 5000), request("no-prompt", prompt=0), request("set", field={1, 2, object()})]
        answers = mixed.scheduler.put_requests([*bad, *reqs])
        assert answers[len(bad) :] == [(user_id, None) for user_id in odd]
        errors = [error for _, error in answers[: len(bad)]]
        assert "must be text, and not empty" in errors[0] and "takes 5000 bytes" in errors[1]
        assert "no prompt_token_ids" in errors[2] and "field is a object, which is no JSON value" in errors[3]
        results = read_all(mixed.scheduler, odd)
        for r in reqs:
            assert tokens_of(results[r.request_id]) == toy_answer(r.prompt_token_ids, r.max_tokens)


def test_same_id_twice_is_refused_also_in_one_batch_and_the_first_is_served(redis_server, topic):
    with node(redis_server, topic, "mixed", {}) as mixed:
        answers = mixed.scheduler.put_requests([request("same"), request("same"), request("other")])
        assert [error is None for _, error in answers] == [True, False, True]
        assert "'same' was used before" in answers[1][1]
        results = read_all(mixed.scheduler, ["same", "other"])
        assert tokens_of(results["same"]) == toy_answer(request("same").prompt_token_ids, 8)


def test_request_that_nobody_serves_in_time_ends_with_an_error_result(redis_server, topic):
    with SplitWiseScheduler(config_for(redis_server, topic, ttl=0.5)) as scheduler:
        scheduler.start("prefill", "h", announced("prefill", "h", 1))
        assert scheduler.put_requests([request("late#1")]) == [("late#1", None)]
        (result,) = read_all(scheduler, ["late#1"])["late#1"]
        assert (result.error_code, result.finished, result.outputs.token_ids) == (500, True, [])
        assert "request late#1 expired: it did not end before its deadline" in result.error_msg


def test_error_of_an_engine_reaches_the_user_with_its_code(redis_server, topic):
    class Failing(EngineLoop):
        def result(self, task: Any, index: int, *, finished: bool) -> RequestOutput:
            if index < 2:
                return super().result(task, index, finished=False)
            return RequestOutput(task.request_id, None, finished, error_code=507, error_msg="no KV left")

    with SplitWiseScheduler(config_for(redis_server, topic)) as scheduler:
        scheduler.start("mixed", "h", None)
        with Failing(scheduler, "mixed", {}):
            scheduler.put_requests([request("r0")])
            results = read_all(scheduler, ["r0"])["r0"]
            assert [r.error_code for r in results] == [200, 200, 507]
            assert "no KV left" in results[-1].error_msg and results[-1].finished


def test_result_that_is_not_made_of_json_values_ends_its_request_alone(redis_server, topic):
    class Odd(EngineLoop):
        def result(self, task: Any, index: int, *, finished: bool) -> RequestOutput:
            result = super().result(task, index, finished=finished)
            if task.request_id == "odd" and index == 1:
                result.metrics = {"where": object()}
            return result

    with SplitWiseScheduler(config_for(redis_server, topic)) as scheduler:
        scheduler.start("mixed", "h", None)
        with Odd(scheduler, "mixed", {}):
            scheduler.put_requests([request("odd"), request("even")])
            results = read_all(scheduler, ["odd", "even"])
            assert "metrics.where is a object, which is no JSON value" in results["odd"][-1].error_msg
            assert tokens_of(results["even"]) == toy_answer(request("even").prompt_token_ids, 8)


def test_what_is_not_admitted_stays_in_order_for_the_next_call(redis_server, topic):
    with SplitWiseScheduler(config_for(redis_server, topic)) as scheduler:
        scheduler.start("mixed", "h", None)
        reqs = [request(f"r{i}", prompt=16 * (1 + i % 4)) for i in range(12)]
        # One at a time: requests that are put in together have no order among them.
        for r in reqs:
            assert scheduler.put_requests([r]) == [(r.request_id, None)]
        taken: list[list[str]] = []
        while sum(map(len, taken)) < len(reqs):
            # Five blocks: at most two requests with a block for the output of each.
            got = scheduler.get_requests(5, 16, 1, 10_000, batch=6)
            assert sum(t.prompt_token_ids_len // 16 + 1 for t in got) <= 5
            taken.append([t.request_id for t in got])
        assert [i for batch in taken for i in batch] == [r.request_id for r in reqs]


def test_no_blocks_or_no_batch_takes_nothing_from_the_queue(redis_server, topic):
    with (
        SplitWiseScheduler(config_for(redis_server, topic)) as full,
        node(redis_server, topic, "mixed", {}) as free,
    ):
        full.start("mixed", "h", None)
        for _ in range(3):
            assert full.get_requests(2, 16, 2, 1000, batch=4) == full.get_requests(100, 16, 2, 1000, batch=0) == []
        ask(free.scheduler, [request(f"r{i}") for i in range(20)])


def test_engine_that_tells_nothing_of_a_request_loses_it_to_another(redis_server, topic):
    with SplitWiseScheduler(config_for(redis_server, topic, release_load_expire_period=1)) as silent:
        silent.start("mixed", "h", None)
        assert silent.put_requests([request("r0")]) == [("r0", None)]
        taken: list[Any] = []
        while not taken:
            taken = silent.get_requests(100, 16, 2, 1000)
        with node(redis_server, topic, "mixed", {}) as other:
            results = read_all(silent, ["r0"])["r0"]
            assert tokens_of(results) == toy_answer(taken[0].prompt_token_ids, 8)
            # The silent one may have claimed the second run too, before the other was there.
            assert [t.request_id.partition("#")[0] for t in other.seen] == ["r0"]
            assert other.seen[0].request_id in ("r0#2", "r0#3")
            late = RequestOutput(taken[0].request_id, results[0].outputs, finished=True)
            silent.put_results([late])
            assert silent.get_results() == {}


def test_busy_engine_that_asks_for_nothing_keeps_its_lease(redis_server, topic):
    with SplitWiseScheduler(config_for(redis_server, topic, expire_period=600)) as scheduler:
        scheduler.start("mixed", "h", None)
        instance_id = scheduler.infer.instance_id
        key = f"pd:{{{topic}:0}}:instance:{instance_id}"
        with redis_server.client(decode_responses=True) as client:

            def seen_for_ms() -> int:
                seen, started = client.hmget(key, "seen_ms", "started_ms")
                return int(seen) - int(started)

            while seen_for_ms() < 1800:
                time.sleep(0.05)
        assert scheduler.infer.instance_id == instance_id


def test_results_of_decode_that_come_before_the_word_of_their_request_are_kept_and_come_out_in_order(
    redis_server, topic
):
    with (
        SplitWiseScheduler(config_for(redis_server, topic)) as prefill,
        SplitWiseScheduler(config_for(redis_server, topic)) as decode,
    ):
        prefill.start("prefill", "h", announced("prefill", "h", 1))
        decode.start("decode", "h", announced("decode", "h", 2))
        asked = request("r0", max_tokens=4)
        engine = EngineLoop(decode, "decode", {})
        decode.put_results([engine.result(asked, 1, finished=False), engine.result(asked, 2, finished=False)])
        prefill.put_requests([asked])
        tasks: list[Any] = []
        while not tasks:
            tasks = prefill.get_requests(100, 16, 2, 1000)
        decode.put_results([engine.result(asked, 3, finished=True)])
        assert prefill.get_results() == {}
        prefill.put_results([engine.result(tasks[0], 0, finished=True)])
        assert tokens_of(read_all(prefill, ["r0"])["r0"]) == toy_answer(asked.prompt_token_ids, 4)


def test_several_results_of_one_request_in_one_call_all_arrive(redis_server, topic):
    with SplitWiseScheduler(config_for(redis_server, topic)) as scheduler:
        scheduler.start("mixed", "h", None)
        scheduler.put_requests([request("r0", max_tokens=9), request("r1", max_tokens=9)])
        tasks: list[Any] = []
        while len(tasks) < 2:
            tasks += scheduler.get_requests(100, 16, 2, 1000, batch=2)
        engine = EngineLoop(scheduler, "mixed", {})
        scheduler.put_results([engine.result(task, i, finished=i == 8) for i in range(9) for task in tasks])
        for user_id, results in read_all(scheduler, ["r0", "r1"]).items():
            assert tokens_of(results) == toy_answer(request(user_id).prompt_token_ids, 9)


class StrictOutput:
    """Builds of exactly the parts that FastDeploy's class has, and of nothing that lacks one."""

    def __init__(
        self,
        *,
        outputs,
        metrics,
        request_id,
        finished,
        prompt,
        prompt_token_ids,
        num_cached_tokens,
        error_code,
        error_msg,
    ):
        self.request_id, self.finished, self.error_code, self.error_msg = request_id, finished, error_code, error_msg
        self.token_ids = outputs["token_ids"]
        self.index, self.send_idx, self.arrival_time = outputs["index"], outputs["send_idx"], metrics["arrival_time"]

    @classmethod
    def from_dict(cls, d):
        outputs, metrics = d.pop("outputs"), d.pop("metrics")
        return cls(outputs=outputs, metrics=metrics, **d)


def test_class_of_the_engine_s_own_takes_answers_and_error_results(redis_server, topic):
    with node(redis_server, topic, "mixed", {}, output_class=StrictOutput, ttl=2) as mixed:
        mixed.scheduler.put_requests([request("r0")])
        results = read_all(mixed.scheduler, ["r0"])["r0"]
        assert [r.send_idx for r in results] == list(range(8))
        assert [t for r in results for t in r.token_ids] == toy_answer(request("r0").prompt_token_ids, 8)
        mixed.go.clear()
        mixed.scheduler.put_requests([request("late")])
        assert [r.error_code for r in read_all(mixed.scheduler, ["late"])["late"]] == [500]


class PickyRequest(Request):
    @classmethod
    def from_dict(cls, data):
        if data["prompt"] == "picked":
            raise KeyError("prompt")
        return super().from_dict(data)


def test_request_that_the_engine_s_class_does_not_take_ends_alone_with_the_reason(redis_server, topic):
    with node(redis_server, topic, "mixed", {}, request_class=PickyRequest) as mixed:
        picked = request("picked")
        picked.prompt = "picked"
        mixed.scheduler.put_requests([picked, request("plain")])
        results = read_all(mixed.scheduler, ["picked", "plain"])
        assert "PickyRequest.from_dict does not take it: KeyError('prompt')" in results["picked"][0].error_msg
        assert tokens_of(results["plain"])


def test_requests_are_refused_with_the_reason_when_redis_has_gone(private_redis_server, topic):
    with SplitWiseScheduler(config_for(private_redis_server, topic)) as scheduler:
        scheduler.start("mixed", "h", None)
        private_redis_server.process.kill()
        private_redis_server.process.wait()
        answers = scheduler.put_requests([request("r0"), request("r1")])
        assert [user_id for user_id, _ in answers] == ["r0", "r1"] and all(error for _, error in answers)
        assert scheduler.get_requests(100, 16, 2, 1000) == []


def test_results_can_be_taken_of_some_requests_only(redis_server, topic):
    with node(redis_server, topic, "mixed", {}) as mixed:
        mixed.scheduler.put_requests([request("a"), request("b")])
        got: list[Any] = []
        while not (got and got[-1].finished):
            more = mixed.scheduler.get_results(request_ids=["a"])
            assert more.keys() <= {"a"}
            got += more.get("a", [])
        assert tokens_of(got) and tokens_of(read_all(mixed.scheduler, ["b"])["b"])


def test_start_that_fails_says_why_and_leaves_no_thread(redis_server, topic):
    with SplitWiseScheduler(config_for(redis_server, topic)) as mixed:
        mixed.start("mixed", "h", None)
        with pytest.raises(ConfigError, match="started already"):
            mixed.start("mixed", "h", None)
        with pytest.raises(ConfigError, match="before start"):
            mixed.reset_nodeid("other")
        other = SplitWiseScheduler(config_for(redis_server, topic))
        with pytest.raises(IncompatibleInstance, match="roles 'prefill and decode'"):
            other.start("prefill", "h", {})
        with pytest.raises(ConfigError, match="role is 'both'"):
            other.start("both", "h", {})
        with pytest.raises(ConfigError, match="must be a dict"):
            other.start("decode", "h", ["ipc"])
        nobody = SplitWiseScheduler(config_for(redis_server, topic))
        nobody.scheduler._settings = nobody.scheduler._settings.model_copy(update={"scheduler_port": 1})
        with pytest.raises(StoreUnavailable):
            nobody.start("mixed", "h", None)
    assert not [t for t in threading.enumerate() if t.name.startswith("splitwise-")]


def test_scheduler_that_was_not_started_takes_nothing_and_gives_nothing(redis_server, topic):
    scheduler = SplitWiseScheduler(config_for(redis_server, topic, nodeid="n"))
    scheduler.reset_nodeid(f"{scheduler.infer.nodeid}_3")
    assert scheduler.scheduler.nodeid == scheduler.infer.nodeid == "n_3"
    assert "was not started" in scheduler.put_requests([request("r")])[0][1]
    assert scheduler.get_requests(10, 16, 1, 100) == [] and scheduler.get_results() == {}
    scheduler.start("mixed", "h", None)
    assert scheduler.infer.instance_id.startswith("n_3-")
    scheduler.stop()


class Node:
    """A node in a process of its own."""

    def __init__(self, server: Any, topic: str, role: str, nodeid: str, *, is_mute: bool = False) -> None:
        options = {"host": server.host, "port": server.port, "topic": topic, "expire_period": 1000}
        argument = json.dumps({**options, "role": role, "nodeid": nodeid, "step_s": 0.02, "is_mute": is_mute})
        command = [sys.executable, "-m", "tests.integration.fastdeploy_loop", argument]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.instance_id = self.read_line()
        assert self.instance_id.startswith(nodeid)

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.parametrize("victim", ["prefill", "decode", "mixed"])
def test_requests_of_a_killed_node_are_run_again_from_where_their_users_are(redis_server, topic, victim):
    other = {"prefill": "decode", "decode": "prefill"}
    reqs = [request(f"r#{i}", max_tokens=40) for i in range(12)]
    with contextlib.ExitStack() as nodes:
        scheduler = nodes.enter_context(SplitWiseScheduler(config_for(redis_server, topic)))
        # A front end for which nobody asks: its own engine takes no requests.
        scheduler.start("mixed" if victim == "mixed" else "prefill", "h", announced("prefill", "h", 1))
        if victim in other:
            nodes.enter_context(Node(redis_server, topic, other[victim], "stays"))
        killed = nodes.enter_context(Node(redis_server, topic, victim, "killed", is_mute=victim == "prefill"))
        assert scheduler.put_requests(reqs) == [(r.request_id, None) for r in reqs]
        results: dict[str, list[Any]] = {r.request_id: [] for r in reqs}
        if victim == "prefill":
            held = {killed.read_line() for _ in range(4)}
            # An id that looks like one of a later run gets the epoch from the first run on.
            assert held < {f"{r.request_id}#1" for r in reqs}
        while victim != "prefill" and not all(len(r) >= 3 for r in results.values()):
            for user_id, more in scheduler.get_results().items():
                results[user_id] += more
        killed.process.send_signal(signal.SIGKILL)
        nodes.enter_context(Node(redis_server, topic, victim, "comes"))
        for user_id, more in read_all_on(scheduler, results).items():
            r = next(r for r in reqs if r.request_id == user_id)
            assert tokens_of(more) == toy_answer(r.prompt_token_ids, 40), user_id


def read_all_on(scheduler: SplitWiseScheduler, results: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """``read_all``, with what was read before."""
    ended = {i: r for i, r in results.items() if r and r[-1].finished}
    rest = read_all(scheduler, [i for i in results if i not in ended])
    return {**ended, **{i: results[i] + more for i, more in rest.items()}}
