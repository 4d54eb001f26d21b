"""Request and output for loops that bring no classes of their own, and the choice of the classes to build."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_THEIR_MODULE = "fastdeploy.engine.request"


@dataclass
class Request:
    """A request as an engine loop sees it.

    Attributes:
        prompt_token_ids: after a re-run, with the output tokens that its user already has at the end.
        disaggregate_info: set by the scheduler: how to reach the peer that the request's KV goes to or comes from;
            None on a mixed instance.
        others: everything else that the loop wants to find again; JSON values.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int = 16
    prompt: str | None = None
    prompt_token_ids_len: int = 0
    arrival_time: float = field(default_factory=time.time)
    disaggregate_info: dict[str, Any] | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_token_ids_len = len(self.prompt_token_ids)

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}
        return {**self.others, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Request:
        names = {f.name for f in fields(cls)} - {"others"}
        mine = {name: value for name, value in data.items() if name in names}
        return cls(**mine, others={name: value for name, value in data.items() if name not in names})


@dataclass
class CompletionOutput:
    """Output tokens of one step.

    Attributes:
        send_idx: output position of ``token_ids[0]``; 0 is the first token.
    """

    index: int
    send_idx: int
    token_ids: list[int]
    text: str | None = None


@dataclass
class RequestOutput:
    """One result of a request.

    Attributes:
        finished: nothing comes after it.
        error_code: 200, or why there is no answer; then ``finished`` is set.
        metrics: what the loop measured; JSON values.
    """

    request_id: str
    outputs: CompletionOutput | None = None
    finished: bool = False
    prompt: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    num_cached_tokens: int = 0
    error_code: int = 200
    error_msg: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RequestOutput:
        names = {f.name for f in fields(cls)}
        mine = {name: value for name, value in data.items() if name in names}
        if isinstance(mine.get("outputs"), Mapping):
            parts = {f.name: mine["outputs"].get(f.name) for f in fields(CompletionOutput)}
            mine["outputs"] = CompletionOutput(**parts)
        return cls(**mine)


class Classes:
    """Which classes to build requests and outputs of.

    Those given in the configuration; else those of the objects that the program itself put in; else FastDeploy's own,
    when the embedding engine has them loaded; else the ones here.
    """

    def __init__(self, request_class: Any = None, output_class: Any = None) -> None:
        self._request, self._output = request_class, output_class
        self._seen_request: Any = None
        self._seen_output: Any = None

    def saw_request(self, request: object) -> None:
        self._seen_request = type(request)

    def saw_output(self, output: object) -> None:
        self._seen_output = type(output)

    @property
    def request(self) -> Any:
        return self._request or self._seen_request or _loaded("Request") or Request

    @property
    def output(self) -> Any:
        return self._output or self._seen_output or _loaded("RequestOutput") or RequestOutput


def _loaded(name: str) -> Any:
    return getattr(sys.modules.get(_THEIR_MODULE), name, None)
