"""One request from its body to its answer: a job for the engine, and what its client does meanwhile."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from hqc.errors import HqcError
from hqc.serving.backend import Backend
from hqc.serving.engine import Engine
from hqc.serving.errors import ApiError, Busy, Stopped, TimeUp
from hqc.serving.files import in_base64
from hqc.serving.guards import NEVER_AGAIN, error_body
from hqc.serving.jobs import Job, job_of
from hqc.serving.limits import Limits
from hqc.serving.metrics import EngineMetrics
from hqc.serving.offer import Offer
from hqc.serving.requests import GenerationRequest
from hqc.serving.schemas import GenerationResponse, ImageDatum, Metrics, Usage
from hqc.serving.tickets import Ticket

__all__ = ["Generations", "Left", "body_of"]

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0


class Left(Exception):
    """The client has gone: there is nobody to answer."""


async def body_of(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 408, 413 or 415 for how it came.
        Left: if it never came whole.
    """
    try:
        async with asyncio.timeout(limits.body_s):
            return await _limited_body(request, limits.max_body_bytes)
    except TimeoutError:
        message = f"the body has not arrived within {limits.body_s:g} s"
        raise ApiError(408, message, code="body_too_slow", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Left from None


@dataclass(frozen=True)
class Generations:
    """Runs requests to one model on its engine, and answers in one piece or as a stream of events."""

    engine: Engine
    backend: Backend
    offer: Offer
    metrics: EngineMetrics
    model: str
    runtime: str

    async def job(self, asked: GenerationRequest) -> Job:
        """What a request asks this model for.

        Raises:
            ApiError: 400 for what is wrong with it.
        """
        job = job_of(asked, self.offer)
        # In a thread: it may wait for a step of an image.
        refusal = await asyncio.to_thread(self.backend.check_steps, job.num_inference_steps, job.scheduler)
        if refusal is not None:
            message = f"num_inference_steps: {job.num_inference_steps}, {refusal}"
            raise ApiError(400, message, param="num_inference_steps", code="invalid_value")
        return job

    def submit(self, job: Job, see: Callable[[int, Any], None] | None = None) -> Ticket:
        """Puts a job in the line; `see` is given its previews, in the engine's thread.

        Raises:
            ApiError: 429 if the line is full, 503 while the server shuts down.
        """
        begins = [lambda drawing=drawing: self.backend.begin(drawing) for drawing in job.drawings(see)]
        try:
            return self.engine.submit(begins, time_limit_s=self.offer.limits.request_s)
        except Busy as error:
            self.metrics.refused()
            headers = {"Retry-After": str(error.retry_s)}
            raise ApiError(429, str(error), code="queue_full", headers=headers) from None
        except Stopped:
            raise _stopped() from None

    async def answer(self, request: Request, job: Job) -> GenerationResponse:
        """The images of a job, once they are all there; a client that leaves ends them.

        Raises:
            ApiError: as `submit`; 500 if the model fails, 503 when the server shuts down, 504 when time is up.
            Left: if the client has left.
        """
        ticket = self.submit(job)
        images = asyncio.wrap_future(ticket.result)
        gone = asyncio.ensure_future(_gone(request))
        either: set[asyncio.Future[Any]] = {images, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not images.done():
                raise Left
            drawn = _drawn(images)
        finally:
            gone.cancel()
            ticket.cancel()
        files = await asyncio.to_thread(_files, drawn, job)
        data = [
            ImageDatum(b64_json=file, revised_prompt=job.drawn, seed=seed)
            for file, seed in zip(files, job.seeds, strict=True)
        ]
        return GenerationResponse(
            created=int(time.time()),
            data=data,
            model=self.model,
            output_format=job.output_format,
            size=self.offer.size,
            metrics=_metrics(ticket),
        )

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The events of a stream: previews, the image, or an error. Submitted before the first of them is asked for.

        Raises:
            ApiError: as `submit`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()
        ticket = self.submit(job, lambda index, pixels: _call_soon(loop, news.put_nowait, (index, pixels)))
        return self._events(job, ticket, news)

    async def _events(self, job: Job, ticket: Ticket, news: "asyncio.Queue[tuple[int, Any]]") -> AsyncIterator[bytes]:
        images = asyncio.wrap_future(ticket.result)
        common = {"size": self.offer.size, "quality": "auto", "background": "opaque"}
        common["output_format"] = job.output_format
        first = True
        try:
            async for index, pixels in _until(images, news):
                if index is None:
                    yield b": keep-alive\n\n"
                    continue
                if first:
                    self.metrics.first_partial(ticket.queued_at)
                    first = False
                (file,) = await asyncio.to_thread(_files, [pixels], job)
                yield _event("image_generation.partial_image", file, common, partial_image_index=index)
            (file,) = await asyncio.to_thread(_files, _drawn(images), job)
            usage, metrics = Usage().model_dump(), _metrics(ticket).model_dump()
            yield _event("image_generation.completed", file, common, usage=usage, metrics=metrics, seed=job.seeds[0])
        except Left:
            return
        except ApiError as error:
            yield _data({"type": "error", **error_body(error)})
        except Exception:
            logger.exception("a stream has failed")
            fault = ApiError(500, "internal error; the server's log has it", code="internal_error")
            yield _data({"type": "error", **error_body(fault)})
        finally:
            ticket.cancel()


async def _until(
    images: "asyncio.Future[list[Any]]", news: "asyncio.Queue[tuple[int, Any]]"
) -> AsyncIterator[tuple[int | None, Any]]:
    """Previews until the images are there; (None, None) where nothing has come for long."""
    while True:
        waiting = asyncio.ensure_future(news.get())
        either: set[asyncio.Future[Any]] = {waiting, images}
        try:
            await asyncio.wait(either, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()  # also where the client has left, and nobody asks for the next
        if waiting.done():
            yield waiting.result()
            continue
        if images.done():
            while not news.empty():
                yield news.get_nowait()
            return
        yield None, None


def _drawn(images: "asyncio.Future[list[Any]]") -> list[Any]:
    """The images of a request that has ended.

    Raises:
        ApiError: for whatever it ended with instead.
    """
    if images.cancelled():
        raise Left
    error = images.exception()
    if error is None:
        return images.result()
    if isinstance(error, Stopped):
        raise _stopped()
    if isinstance(error, TimeUp):
        raise ApiError(504, "the images took longer than this server allows", code="time_limit", headers=NEVER_AGAIN)
    if isinstance(error, HqcError):
        raise ApiError(500, str(error), code="generation_failed", headers=NEVER_AGAIN) from error
    raise error


def _stopped() -> ApiError:
    headers = {"Retry-After": "5", "Connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


def _files(images: list[Any], job: Job) -> list[str]:
    return [in_base64(pixels, job.output_format, job.output_compression) for pixels in images]


def _metrics(ticket: Ticket) -> Metrics:
    return Metrics(queue_seconds=round(ticket.queue_s, 6), seconds=round(ticket.run_s, 6))


def _event(kind: str, file: str, common: dict[str, Any], **more: Any) -> bytes:
    return _data({"type": kind, "b64_json": file, "created_at": int(time.time()), **common, **more})


def _data(content: dict[str, Any]) -> bytes:
    """One server-sent event. Without an id: clients keep one, and take a blank line for an event then."""
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode()


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *values)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _limited_body(request: Request, max_bytes: int) -> bytes:
    """The body, read no further than the limit, whatever Content-Length says.

    Raises:
        ApiError: 413 above the limit; 415 for a body that is not declared as JSON (otherwise a page of
            another origin could send one from a browser without asking).
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        raise ApiError(
            415, "send the body with the header Content-Type: application/json", code="unsupported_media_type"
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, f"the body is above the limit of {max_bytes} bytes", code="body_too_large")
    return bytes(body)
