"""The life of one completion request in the gateway: from the checked call to the pieces of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from splitwise_sched.errors import SplitwiseError
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.gateway.answer_text import AnswerText, Piece
from splitwise_sched.gateway.answers import AnswerShape, ChatShape, CompletionShape, usage_of
from splitwise_sched.gateway.calls import Call, ChatCall, CompletionCall
from splitwise_sched.gateway.errors import ApiError, unavailable
from splitwise_sched.gateway.metrics import RequestTimer
from splitwise_sched.gateway.models import ServedModel, ServedModels
from splitwise_sched.gateway.settings import GatewaySettings
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.types import FinishReason, Request

logger = logging.getLogger(__name__)

# Tokenizing so much takes about 10 ms, for which the other streams would wait.
LONG_TEXT_CHARS = 20_000
DEFAULT_PRIORITY = "default"


class Answer:
    """A submitted request; whoever has it closes it."""

    def __init__(self, stream: OutputStream, text: AnswerText, shape: AnswerShape, timer: RequestTimer) -> None:
        self.shape = shape
        self._stream = stream
        self._text = text
        self._timer = timer

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The parts of the answer as they come; the last has a finish reason.

        Raises:
            RequestFailed: it ended without an answer.
            ApiError: somebody else cancelled it.
        """
        async for output in self._stream:
            self._timer.got_tokens(len(output.token_ids))
            if output.finish_reason is FinishReason.CANCELLED:
                detail = output.detail or "no reason was given"
                raise unavailable(f"request {self._stream.request_id} was cancelled: {detail}", "request_cancelled")
            piece = self._text.feed(output)
            if piece.finish_reason is not None:
                self._timer.finished()
            shows_ids = self.shape.with_token_ids and piece.token_ids
            if piece.text or piece.tokens or shows_ids or piece.finish_reason is not None:
                yield piece
            if piece.finish_reason is not None:
                return

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(len(self._stream.request.prompt_token_ids), self._text.num_tokens)

    async def close(self) -> None:
        """Cancel what has not ended. Idempotent."""
        try:
            await self._stream.aclose()
        except SplitwiseError as exc:
            logger.warning("request %s is not cancelled, it will expire: %s", self._stream.request_id, exc)


class CompletionService:
    """Turns calls into requests, and their outputs into answers."""

    def __init__(self, frontend: FrontEnd, models: ServedModels, settings: GatewaySettings) -> None:
        self._frontend = frontend
        self._models = models
        self._settings = settings

    async def submit(self, call: CompletionCall | ChatCall, request_id: str, timer: RequestTimer) -> Answer:
        """
        Raises:
            ApiError, SplitwiseError: the request was not taken.
        """
        model = await self._models.find(call.model)
        prompt = await self._tokenize(call, model)
        max_tokens = self._max_tokens(call, len(prompt), model)
        request = Request(
            request_id,
            model.name,
            tuple(prompt),
            call.sampling(max_tokens),
            timeout_s=self._settings.request_timeout_s,
            priority=call.priority or DEFAULT_PRIORITY,
            tenant=call.tenant,
        )
        stream = await self._frontend.submit(request)
        timer.took_prompt(len(prompt))
        kind = ChatShape if isinstance(call, ChatCall) else CompletionShape
        shape = kind(
            request_id,
            model.name,
            model.tokenizer,
            with_logprobs=call.num_logprobs is not None,
            with_usage=call.include_usage,
            with_token_ids=call.return_token_ids,
        )
        text = AnswerText(model.tokenizer, request.sampling.stop, request.sampling.stop_token_ids)
        return Answer(stream, text, shape, timer)

    async def _tokenize(self, call: CompletionCall | ChatCall, model: ServedModel) -> list[int]:
        tokenizer = model.tokenizer
        if isinstance(call, ChatCall):
            if sum(len(message["content"]) for message in call.messages) > LONG_TEXT_CHARS:
                return await asyncio.to_thread(tokenizer.apply_chat_template, call.messages)
            return tokenizer.apply_chat_template(call.messages)
        if isinstance(call.prompt, str):
            if len(call.prompt) > LONG_TEXT_CHARS:
                return await asyncio.to_thread(tokenizer.encode, call.prompt)
            return tokenizer.encode(call.prompt)
        for position, token_id in enumerate(call.prompt):
            if not 0 <= token_id < tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"prompt[{position}] is {token_id}: the token ids of {model.name!r} are 0 to "
                    f"{tokenizer.vocab_size - 1}",
                    param="prompt",
                )
        return call.prompt

    def _max_tokens(self, call: Call, num_prompt_tokens: int, model: ServedModel) -> int:
        room = model.max_model_len - num_prompt_tokens
        wanted = call.wanted_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and max_tokens is {wanted}"
            raise ApiError(
                400,
                f"the prompt has {num_prompt_tokens} tokens{asked}, but model {model.name!r} takes at most "
                f"{model.max_model_len} tokens of prompt and output together: shorten the prompt"
                + (f", or ask for at most {room} tokens" if room >= 1 else ""),
                param="messages" if isinstance(call, ChatCall) else "prompt",
                code="context_length_exceeded",
            )
        return min(self._settings.default_max_tokens, room) if wanted is None else wanted
