"""The gateway as an application: its routes, and what holds for every request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from shoal.gateway.bodies import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    MessagesRequest,
    PromptBody,
    ResponsesRequest,
)
from shoal.gateway.endpoints.chat_completions import ChatAnswer
from shoal.gateway.endpoints.completions import CompletionAnswer
from shoal.gateway.endpoints.embeddings import embeddings
from shoal.gateway.endpoints.messages import MessagesAnswer, num_prompt_tokens
from shoal.gateway.endpoints.responses import ResponsesAnswer
from shoal.gateway.error_objects import Refused, refused, wrong_body
from shoal.gateway.guard.admission import Account, Admission
from shoal.gateway.guard.metrics import Metrics
from shoal.gateway.guard.middleware import MAX_BODY_BYTES, ErrorObjects, Keys, KnownHosts, RequestIds
from shoal.gateway.page.watch import page_events
from shoal.gateway.replies import Usage
from shoal.gateway.served_model import ServedModel

log = logging.getLogger(__name__)
T = TypeVar("T")

Answer = ChatAnswer | CompletionAnswer | ResponsesAnswer | MessagesAnswer

PAGE = Path(__file__).parent / "page" / "files"
PAGE_FILES = frozenset(path.name for path in PAGE.iterdir())
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
CLOSED_REQUEST = 499
"""The status of a request whose client went away. Only the log shows it."""


class Gateway:
    """The models by their names, and who may use them."""

    def __init__(self, models: Sequence[ServedModel], admission: Admission) -> None:
        self.models: Mapping[str, ServedModel] = {each.name: each for each in models}
        self.admission = admission
        self.metrics = Metrics(admission)

    def model(self, name: str) -> ServedModel:
        """The model that a request names. Raises `Refused`."""
        if (found := self.models.get(name)) is None:
            known = ", ".join(self.models)
            raise Refused(
                404, f"the model {name} does not exist here; there is {known}", param="model", code="model_not_found"
            )
        return found

    async def answer(
        self, request: Request, make: Any, body: ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest
    ) -> Response:
        """Answer a request: at once, or as a stream of events."""
        began = time.monotonic()
        account: Account = request.state.account
        served = self.model(body.model)
        async with AsyncExitStack() as stack:
            asker = await stack.enter_async_context(self.admission.admitted(account))
            answer: Answer = await asyncio.to_thread(make, served, body, asker=asker)
            if not body.stream:
                try:
                    return JSONResponse(await unless_gone(request, answer.whole()))
                finally:
                    self.count(account, served, answer.usages)
            chunks = answer.chunks()
            stack.callback(self.count, account, served, answer.usages)
            stack.push_async_callback(chunks.aclose)
            # The first one tells whether there will be an answer at all. After it, the status cannot be changed.
            first = await unless_gone(request, anext(chunks))
            self.metrics.first_token.labels(served.name).observe(time.monotonic() - began)
            kept = stack.pop_all()
        return StreamingResponse(
            _events(answer, first, chunks, kept, request_id=request.state.request_id),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )

    def count(self, account: Account, served: ServedModel, usages: Sequence[Usage]) -> None:
        """Note the tokens of a request that has ended."""
        for usage in usages:
            account.tokens.use(usage.prompt_tokens + usage.completion_tokens)
            self.metrics.tokens.labels(served.name, "read").inc(usage.prompt_tokens)
            self.metrics.tokens.labels(served.name, "generated").inc(usage.completion_tokens)

    async def embeddings(self, request: Request, body: EmbeddingRequest) -> Response:
        """Answer a request for embeddings."""
        account: Account = request.state.account
        served = self.model(body.model)
        async with self.admission.admitted(account) as asker:
            found, usage = await unless_gone(request, embeddings(served, body, asker=asker))
        self.count(account, served, [usage])
        return JSONResponse(found)


async def _events(
    answer: Answer,
    first: dict[str, Any],
    chunks: AsyncGenerator[dict[str, Any], None],
    kept: AsyncExitStack,
    *,
    request_id: str,
) -> AsyncIterator[str]:
    """Server-sent events: with the names that their type is, or else with the end that OpenAI's older API has.

    An error in the middle is an event too, because the status has been sent. `kept` is left at the end.
    """
    named = answer.events_are_named
    async with kept:
        try:
            yield _event(first, named=named)
            async for chunk in chunks:
                yield _event(chunk, named=named)
            if not named:
                yield "data: [DONE]\n\n"
        except Exception as error:
            found = refused(error)
            log.warning("%s ended with an error: %s", request_id, error, exc_info=found.status == 500)
            yield _event(answer.failure(found), named=named)


def _event(value: dict[str, Any], *, named: bool) -> str:
    name = f"event: {value['type']}\n" if named else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away. Raises `Refused` then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused(CLOSED_REQUEST, "the client has gone")
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def application(gateway: Gateway, *, origins: Sequence[str] = (), hosts: Collection[str] | None = None) -> FastAPI:
    """The application. `origins` are those of pages whose scripts may use it (CORS).

    Requests have to name one of the `hosts`; with `None`, any.
    """
    app = FastAPI(title="shoal gateway", docs_url=None, redoc_url=None, max_body_size=MAX_BODY_BYTES)
    app.add_middleware(Keys, admission=gateway.admission)
    app.add_middleware(ErrorObjects)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    if hosts is not None:
        app.add_middleware(KnownHosts, hosts=hosts)
    app.add_middleware(RequestIds, metrics=gateway.metrics)
    _handle_errors(app)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await gateway.answer(request, ChatAnswer, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await gateway.answer(request, CompletionAnswer, body)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        return await gateway.answer(request, ResponsesAnswer, body)

    @app.post("/v1/messages")
    async def messages(request: Request, body: MessagesRequest) -> Response:
        return await gateway.answer(request, MessagesAnswer, body)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: PromptBody) -> dict[str, int]:
        return {"input_tokens": await asyncio.to_thread(num_prompt_tokens, gateway.model(body.model), body)}

    @app.post("/v1/embeddings")
    async def embeddings_(request: Request, body: EmbeddingRequest) -> Response:
        return await gateway.embeddings(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(each) for each in gateway.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(gateway.model(name))

    @app.get("/health")
    async def health() -> Response:
        missing = {each.name: blocks for each in gateway.models.values() if (blocks := await each.missing_blocks())}
        return JSONResponse({"status": "incomplete" if missing else "ok", "missing": missing}, 503 if missing else 200)

    @app.get("/api/swarm", include_in_schema=False)
    async def swarm(model: str) -> Response:
        served = gateway.model(model)
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(page_events(served), media_type="text/event-stream", headers=headers)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=gateway.metrics.content_type)

    @app.get("/", include_in_schema=False)
    @app.get("/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        if name not in PAGE_FILES:
            raise HTTPException(404, "Not Found")
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)

    return app


def _model(served: ServedModel) -> dict[str, Any]:
    found = {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}
    return found if served.base is None else {**found, "parent": served.base}


def _handle_errors(app: FastAPI) -> None:
    """What FastAPI refuses is refused as all else is."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        raise wrong_body(error.errors(), content_type=request.headers.get("content-type", "nothing"))

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 413:
            message = f"the body is larger than {MAX_BODY_BYTES >> 20} MiB"
        raise Refused(error.status_code, message, headers=dict(error.headers or {}))
