"""Real Redis and Valkey deployments on loopback, for tests and for whoever hurts them: one server, Sentinel, Cluster.

Each is a context manager, owns its processes and directories, and waits until what it was asked for is true. Calls
block; an asyncio program makes them in a thread. Servers die with the process that started them, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from splitwise_sched.embedded import die_with_parent, find_servers
from splitwise_sched.keys import Keys

HOST = "127.0.0.1"
START_TIMEOUT_S = 20.0
# On a machine that stands still for seconds, as a busy host's does, a change may have to begin once more.
CHANGE_TIMEOUT_S = 90.0
TILT_MS = 3000
NUM_SLOTS = 16384
# Below the ports that the kernel gives to clients, so that none of those takes a server's port while it restarts.
_PORTS = range(10_000, 22_000)
_BUS_OFFSET = 10_000
Options = Mapping[str, object]

# The kernel kills a server with the thread that started it: one that lives as long as this process.
_keeper = ThreadPoolExecutor(1, "redis-rig-keeper")
_given_ports: set[int] = set()


@cache
def server_programs() -> dict[str, str]:
    """Programs of the server builds that are here, by where they come from, best first."""
    given = os.environ.get("SPLITWISE_TEST_REDIS")
    return {**({"given": given} if given else {}), **{b.source: str(b.path) for b in find_servers()}}


def any_program() -> str:
    """Raises LookupError when there is none."""
    for program in server_programs().values():
        return program
    raise LookupError("there is no Redis or Valkey server on this machine")


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = CHANGE_TIMEOUT_S) -> None:
    """Poll a server's state until ``condition`` holds; a broken connection counts as not yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {timeout_s:g} s")
        time.sleep(0.01)


def free_port() -> int:
    """A port that is free, and whose Cluster bus port is; given out once in this process."""
    for port in random.sample(_PORTS, 500):
        if port not in _given_ports and _is_free(port) and _is_free(port + _BUS_OFFSET):
            _given_ports.add(port)
            return port
    raise OSError("no free port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class RedisServer:
    """One server on loopback, with an append-only file: ``host``, ``port``, ``url``, ``process``, ``client()``.

    Args:
        options: further lines of its configuration, over those that every server here has.
        tls: lines on certificates; the server then speaks TLS on its port, and nothing else.
        client_options: what a client needs to reach it (TLS, password).
        mode: "--sentinel" for a Sentinel, whose ``options`` are then its whole configuration.
    """

    def __init__(
        self,
        program: str,
        options: Options | None = None,
        *,
        tls: Options | None = None,
        client_options: Options | None = None,
        mode: str = "",
    ) -> None:
        self.host = HOST
        self.port = free_port()
        self.url = f"redis://{self.host}:{self.port}/0"
        self.directory = Path(tempfile.mkdtemp(prefix="splitwise-test-"))
        self._program = program
        self._client_options = dict(client_options or {})
        self._mode = [mode] if mode else []
        common = {
            "appendonly": "yes", "save": '""', "maxmemory-policy": "noeviction", "repl-diskless-sync-delay": 0,
            "repl-ping-replica-period": 1,
        }  # fmt: skip
        self._options = {
            "bind": self.host, "port": self.port, "dir": self.directory, "logfile": self.directory / "log",
            **({} if mode else common), **(options or {}),
            **({"port": 0, "tls-port": self.port, **tls} if tls else {}),
        }  # fmt: skip
        self.process = self._spawn()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise

    def settings_fields(self) -> dict[str, Any]:
        """What SchedulerSettings need to reach it."""
        return {"scheduler_host": self.host, "scheduler_port": self.port}

    def client(self, **options: Any) -> redis.Redis:
        """For text; a failure is told at once."""
        defaults = {"socket_timeout": 2, "retry": Retry(NoBackoff(), 0), **self._client_options}
        return redis.Redis(host=self.host, port=self.port, **{**defaults, **options})

    def ask(self, *command: object) -> Any:
        """One command's reply, as the server gives it, in text."""
        with self.client(decode_responses=True) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def wait_ready(self) -> None:
        """Until it answers, with all its data loaded. Raises RuntimeError, with its log, when it has ended."""

        def answers() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self._program} ended: {self.log_tail}")
            with contextlib.suppress(redis.AuthenticationError):
                self.ask("PING")
            return True

        wait_until(answers, f"{self._program} on port {self.port} answers", START_TIMEOUT_S)

    @property
    def log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return (self.directory / "log").read_text(errors="replace")[-1000:]
        return ""

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL; its data stays. Idempotent."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing, until ``resume``."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def restart(self, *, empty: bool = False, options: Options | None = None) -> None:
        """Kill it and start it again on its port; ``empty``: all that it had written is gone."""
        self.kill()
        if empty:
            for path in self.directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.start(options)

    def start(self, options: Options | None = None) -> None:
        """Start it again after ``kill``, with these lines changed in its configuration."""
        self._options.update(options or {})
        self.process = self._spawn()
        self.wait_ready()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        file = self.directory / "server.conf"
        # A Sentinel keeps what it has found out in this file, and reads it again.
        if not self._mode or not file.exists():
            file.write_text("".join(f"{name} {value}\n" for name, value in self._options.items()))
        command = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())]
        command += [self._program, str(file), *self._mode]
        # In a session of its own: Ctrl-C is for whoever owns it.
        return _keeper.submit(
            subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        ).result()


class _Rig:
    """Several servers; closed in the reverse order."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def _serve(self, server: RedisServer) -> RedisServer:
        return self._stack.enter_context(server)

    def close(self) -> None:
        self._stack.close()

    def __exit__(self, *exc: object) -> None:
        self.close()


class SentinelTrio(_Rig):
    """A master, a replica, and three Sentinels of which two decide.

    Args:
        options: of master and replica; a Sentinel's own lines are in ``sentinel_options``.
        client_options: what clients of both kinds need (TLS).
    """

    service = "splitwise"

    def __init__(
        self,
        program: str | None = None,
        *,
        down_after_ms: int = 1000,
        failover_timeout_ms: int = 2000,
        options: Options | None = None,
        sentinel_options: Options | None = None,
        sentinel_client_options: Options | None = None,
        tls: Options | None = None,
        client_options: Options | None = None,
    ) -> None:
        super().__init__()
        program = program or any_program()
        if tls:
            tls = {"tls-replication": "yes", **tls}
        common: dict[str, Any] = {"tls": tls, "client_options": client_options}
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            first = self._serve(RedisServer(program, options, **common))
            second_options = {**(options or {}), "replicaof": f"{HOST} {first.port}"}
            second = self._serve(RedisServer(program, second_options, **common))
            self.servers = (first, second)
            _wait_in_sync(second)
            sentinel_common = {
                **common,
                "client_options": {**(client_options or {}), **(sentinel_client_options or {})},
            }
            sentinel_lines = {
                "sentinel monitor": f"{self.service} {HOST} {first.port} 2",
                f"sentinel down-after-milliseconds {self.service}": down_after_ms,
                f"sentinel failover-timeout {self.service}": failover_timeout_ms,
                **(sentinel_options or {}),
            }
            self.sentinels = tuple(
                self._serve(RedisServer(program, sentinel_lines, **sentinel_common, mode="--sentinel"))
                for _ in range(3)
            )
            for sentinel in self.sentinels:
                # One that was not run for two seconds does nothing for the next thirty, unless it is told otherwise.
                with contextlib.suppress(redis.ResponseError):
                    sentinel.ask("SENTINEL", "DEBUG", "tilt-period", TILT_MS)
            wait_until(self._is_complete, "the Sentinels know the replica and each other")
            undo.pop_all()

    def __enter__(self) -> SentinelTrio:
        return self

    @property
    def sentinel_addresses(self) -> tuple[str, ...]:
        return tuple(f"{HOST}:{s.port}" for s in self.sentinels)

    def settings_fields(self) -> dict[str, Any]:
        return {"scheduler_sentinels": self.sentinel_addresses, "scheduler_sentinel_service": self.service}

    @property
    def master(self) -> RedisServer:
        """The server that the Sentinels call the master now, be it alive or not."""
        _, port = self._running_sentinel().ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return next(s for s in self.servers if s.port == int(port))

    @property
    def replica(self) -> RedisServer:
        master = self.master
        return next(s for s in self.servers if s is not master)

    def client(self, **options: Any) -> redis.Redis:
        return self.master.client(**options)

    def failover(self, *, in_sync: bool = True) -> RedisServer:
        """Ordered, with both alive; ``in_sync``: returns when the old master follows the new one, some 10 s later."""
        old = self.master

        def ordered() -> bool:
            # Refused, for a while, when the replica did not answer in time, or while another failover goes on.
            return self.master is not old or self._running_sentinel().ask("SENTINEL", "FAILOVER", self.service)

        wait_until(ordered, "a Sentinel takes the order")
        new = self.wait_for_new_master(old)
        if not in_sync:
            return new
        wait_until(lambda: _replication(old)["role"] == "slave", "the old master is a replica")
        _wait_in_sync(old)
        return new

    def kill_master(self) -> RedisServer:
        """SIGKILL; returns it. ``wait_for_new_master`` then says who takes its place."""
        old = self.master
        old.kill()
        return old

    def wait_for_new_master(self, old: RedisServer) -> RedisServer:
        wait_until(lambda: self.master is not old, "the Sentinels name another master")
        new = self.master
        wait_until(lambda: _replication(new)["role"] == "master", "it knows that it is the master")
        return new

    def bring_back(self, server: RedisServer, *, in_sync: bool = True) -> None:
        """Start a killed server again, as the replica that it is now; ``in_sync``: and wait until it is one."""
        server.start({"replicaof": f"{HOST} {self.master.port}"})
        if in_sync:
            _wait_in_sync(server)
            wait_until(self._is_complete, "the Sentinels know the replica")

    def settle(self, timeout_s: float = CHANGE_TIMEOUT_S) -> None:
        """Until all Sentinels name one master, it knows that it is one, and the other server follows it.

        A server that stood still may have been replaced meanwhile, and go on as a master until they tell it, 8 s later.
        """

        def agreed() -> bool:
            masters = {s.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1] for s in self.sentinels}
            states = {str(s.port): _replication(s) for s in self.servers}
            others = [state for port, state in states.items() if port not in masters]
            return (
                len(masters) == len(others) == 1
                and states[masters.pop()]["role"] == "master"
                and others[0].get("master_link_status") == "up"
                and self._is_complete()
            )

        wait_until(agreed, "the Sentinels agree on a master, and the other server follows it", timeout_s)

    def _running_sentinel(self) -> RedisServer:
        return next(s for s in self.sentinels if s.is_running)

    def _is_complete(self) -> bool:
        return all(
            pairs(s.ask("SENTINEL", "MASTER", self.service))["num-other-sentinels"] == "2"
            and any(
                pairs(r)["flags"] == "slave" and pairs(r)["master-link-status"] == "ok"
                for r in s.ask("SENTINEL", "REPLICAS", self.service)
            )
            for s in self.sentinels
        )


class Cluster(_Rig):
    """Three masters, and a replica of the one that has shard 0 of ``topic``.

    Args:
        options: of all nodes.
    """

    def __init__(
        self,
        program: str | None = None,
        *,
        topic: str = "default",
        node_timeout_ms: int = 1500,
        options: Options | None = None,
        tls: Options | None = None,
        client_options: Options | None = None,
    ) -> None:
        super().__init__()
        program = program or any_program()
        if tls:
            tls = {"tls-cluster": "yes", "tls-replication": "yes", **tls}
        common: dict[str, Any] = {"tls": tls, "client_options": client_options}
        lines = {"cluster-enabled": "yes", "cluster-config-file": "nodes.conf",
                 "cluster-node-timeout": node_timeout_ms, **(options or {})}  # fmt: skip
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.nodes = tuple(self._serve(RedisServer(program, lines, **common)) for _ in range(4))
            self._ids = {self._id_of(node): node for node in self.nodes}
            self._join(slot_of(topic))
            undo.pop_all()

    def __enter__(self) -> Cluster:
        return self

    @property
    def node_addresses(self) -> tuple[str, ...]:
        return tuple(f"{HOST}:{node.port}" for node in self.nodes)

    def settings_fields(self) -> dict[str, Any]:
        return {"scheduler_cluster_nodes": self.node_addresses}

    def master_of(self, slot: int) -> RedisServer:
        """As a majority of the running nodes has it, be it alive or not."""
        views = [v for v in map(self._view, self.nodes) if v is not None]
        owners = [next(m for ranges, m, _ in view if slot in ranges) for view in views]
        return max(owners, key=owners.count)

    def replicas_of(self, slot: int) -> tuple[RedisServer, ...]:
        master = self.master_of(slot)
        for view in filter(None, map(self._view, self.nodes)):
            for ranges, owner, replicas in view:
                if slot in ranges and owner is master:
                    return replicas
        return ()

    def client_of(self, slot: int, **options: Any) -> redis.Redis:
        return self.master_of(slot).client(**options)

    def failover(self, slot: int) -> RedisServer:
        """Ordered, without loss; returns the new master of ``slot`` when all agree on it."""
        old = self.master_of(slot)
        self.replicas_of(slot)[0].ask("CLUSTER", "FAILOVER")
        return self.wait_for_new_master(slot, old)

    def kill_master_of(self, slot: int) -> RedisServer:
        old = self.master_of(slot)
        old.kill()
        return old

    def wait_for_new_master(self, slot: int, old: RedisServer) -> RedisServer:
        wait_until(lambda: self.master_of(slot) is not old, "another node has the slot")
        new = self.master_of(slot)
        wait_until(self._all_serve, "all nodes see the whole cluster")
        return new

    def bring_back(self, node: RedisServer) -> None:
        """Start a killed node again; it follows whoever has its slots now."""
        node.start()
        wait_until(lambda: _replication(node).get("master_link_status") == "up", "it follows the new master")
        wait_until(self._all_serve, "all nodes see the whole cluster")

    def settle(self, slot: int, timeout_s: float = CHANGE_TIMEOUT_S) -> None:
        """Until all nodes see the whole cluster, and name the same master of ``slot``."""

        def agreed() -> bool:
            views = [v for v in map(self._view, self.nodes) if v is not None]
            return len({m.port for view in views for ranges, m, _ in view if slot in ranges}) == 1 and self._all_serve()

        wait_until(agreed, "all nodes name the same master", timeout_s)

    def migration(self, slot: int, target: RedisServer | None = None) -> Migration:
        """A move of ``slot`` to another master, to be taken step by step."""
        source = self.master_of(slot)
        masters = (master for view in filter(None, map(self._view, self.nodes)) for _, master, _ in view)
        target = target or next(master for master in masters if master is not source and master.is_running)
        return Migration(slot, source, target, self._id_of, [n for n in self.nodes if n.is_running])

    def migrate(self, slot: int, target: RedisServer | None = None) -> RedisServer:
        """Move a slot to another master, at once; returns that."""
        migration = self.migration(slot, target)
        migration.begin()
        while migration.move(100):
            pass
        migration.finish()
        wait_until(lambda: self.master_of(slot) is migration.target, "all nodes know where the slot is")
        return migration.target

    def _join(self, replicated_slot: int) -> None:
        masters, replica = self.nodes[:3], self.nodes[3]
        for i, node in enumerate(masters):
            slots = range(i * NUM_SLOTS // 3, (i + 1) * NUM_SLOTS // 3)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            node.ask("CLUSTER", "ADDSLOTS", *slots)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", HOST, self.nodes[0].port)
        wait_until(lambda: all(len(self._known(n)) == 4 for n in self.nodes), "the nodes know each other")
        wait_until(self._all_serve, "all nodes see the whole cluster")
        owner = masters[replicated_slot * 3 // NUM_SLOTS]
        replica.ask("CLUSTER", "REPLICATE", self._id_of(owner))
        _wait_in_sync(replica)
        wait_until(lambda: self.replicas_of(replicated_slot) == (replica,), "all nodes know the replica")

    def _all_serve(self) -> bool:
        return all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in self.nodes if node.is_running)

    @staticmethod
    def _id_of(node: RedisServer) -> str:
        return str(node.ask("CLUSTER", "MYID"))

    @staticmethod
    def _known(node: RedisServer) -> list[str]:
        return str(node.ask("CLUSTER", "NODES")).splitlines()

    def _view(self, node: RedisServer) -> list[tuple[range, RedisServer, tuple[RedisServer, ...]]] | None:
        """Slots, their master and its replicas as ``node`` has them; None when it does not answer."""
        if not node.is_running:
            return None
        try:
            rows = node.ask("CLUSTER", "SLOTS")
        except redis.RedisError:
            return None
        return [
            (range(first, last + 1), self._ids[master[2]], tuple(self._ids[r[2]] for r in replicas))
            for first, last, master, *replicas in rows
        ]


class Migration:
    """One slot's way from ``source`` to ``target``: ``begin``, ``move`` some keys again and again, ``finish``."""

    def __init__(
        self, slot: int, source: RedisServer, target: RedisServer, id_of: Callable[[RedisServer], str],
        nodes: Iterable[RedisServer],
    ) -> None:  # fmt: skip
        self.slot, self.source, self.target = slot, source, target
        self._nodes = list(nodes)
        self._source_id, self._target_id = id_of(source), id_of(target)

    def begin(self) -> None:
        """From here on the source sends whoever asks for a key that it does not have to the target (ASK)."""
        self.target.ask("CLUSTER", "SETSLOT", self.slot, "IMPORTING", self._source_id)
        self.source.ask("CLUSTER", "SETSLOT", self.slot, "MIGRATING", self._target_id)

    def move(self, num_keys: int) -> int:
        """Move at most so many keys; returns how many there were to move."""
        keys = self.source.ask("CLUSTER", "GETKEYSINSLOT", self.slot, num_keys)
        self.move_keys(keys)
        return len(keys)

    def move_keys(self, keys: Sequence[str]) -> None:
        """Move these."""
        if keys:
            self.source.ask("MIGRATE", HOST, self.target.port, "", 0, 5000, "KEYS", *keys)

    def finish(self) -> None:
        """All keys are moved: the slot is the target's."""
        for node in (self.target, self.source, *self._nodes):
            # Only masters have a say; a replica learns it from its own.
            if _replication(node)["role"] == "master":
                node.ask("CLUSTER", "SETSLOT", self.slot, "NODE", self._target_id)


def slot_of(topic: str, shard: int = 0) -> int:
    return int(key_slot(Keys(topic, shard).prefix.encode()))


def _replication(server: RedisServer) -> dict[str, Any]:
    with server.client(decode_responses=True) as client:
        return dict(client.info("replication"))


def _wait_in_sync(replica: RedisServer) -> None:
    wait_until(lambda: _replication(replica).get("master_link_status") == "up", "the replica is in sync")


def pairs(reply: Any) -> dict[str, str]:
    """A reply of names and values, as RESP2 and RESP3 have it."""
    if isinstance(reply, dict):
        return {str(k): str(v) for k, v in reply.items()}
    it = iter(reply)
    return dict(zip(it, it, strict=True))
