"""The HTTP application: an OpenAI-shaped images API over one pipeline."""

import base64
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hqc.errors import HqcError, RuntimeMissingError, TrainingError
from hqc.evaluation.images import pil_from_tensor, png_from_pil
from hqc.evaluation.needs import denoiser_of, needs_of
from hqc.evaluation.sampling import SamplingPipeline, sample_images
from hqc.sampling.task import require_steps
from hqc.serving.errors import ApiError
from hqc.serving.limits import Limits
from hqc.serving.schemas import (
    ErrorBody,
    ErrorResponse,
    GenerationResponse,
    Health,
    ImageDatum,
    Job,
    ModelCard,
    ModelList,
    Usage,
    job_from_body,
    request_schema,
    takes,
)
from hqc.serving.worker import Worker

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ModuleNotFoundError as error:
    raise RuntimeMissingError("hqc serve", "fastapi/uvicorn are not installed", "pip install 'hqc[serve]'") from error

__all__ = ["create_app"]

MAX_STEPS = 1000  # of a scheduler that names none

logger = logging.getLogger(__name__)

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is no JSON"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    415: {"model": ErrorResponse, "description": "The body is not declared as JSON"},
    422: {"model": ErrorResponse, "description": "A field is wrong; error.param names it"},
    429: {"model": ErrorResponse, "description": "Too many requests wait; see Retry-After"},
}


def create_app(pipe: SamplingPipeline, *, model_name: str, limits: Limits, runtime: str | None = None) -> FastAPI:
    """An application that samples `pipe`, one request at a time in a thread of its own.

    Routes: `POST /v1/images/generations`, `GET /v1/models`, `GET /health`. Errors have OpenAI's shape.

    Args:
        pipe: any pipeline that `sample_images` takes.
        model_name: how the model is called in responses.
        limits: what a request may ask for.
        runtime: what the denoiser runs on, for `/health`; the class name of `pipe.unet` when None.

    Raises:
        RuntimeMissingError: on import of this module, when FastAPI is not installed.
    """
    needs = needs_of(pipe)
    limits = replace(limits, max_steps=min(limits.max_steps, _most_steps(pipe.scheduler)))
    worker = Worker(limits.max_queue)
    started = int(time.time())
    health = Health(
        status="ok",
        model=model_name,
        runtime=runtime or type(denoiser_of(pipe)).__name__,
        hqc=_hqc_version(),
        takes=takes(needs, limits),
    )
    schema = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": request_schema(needs, limits)}}}
    }

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title=f"hqc: {model_name}", version=health.hqc, lifespan=lifespan, redoc_url=None)
    app.state.worker = worker
    _add_error_handlers(app)

    @app.post("/v1/images/generations", responses=REFUSALS, openapi_extra=schema)
    async def generate(request: Request) -> GenerationResponse:
        """Images of a prompt, of a class, or of nothing in particular, as PNG in base64."""
        body = await _limited_body(request, limits.max_body_bytes)
        job = job_from_body(body, limits, needs)
        _require_steps(pipe, job)
        data, seconds = await worker.run(lambda: _sample(pipe, job))
        return GenerationResponse(created=int(time.time()), data=data, model=model_name, usage=Usage(seconds=seconds))

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[ModelCard(id=model_name, created=started)])

    @app.get("/health")
    async def healthy() -> Health:
        """What the model takes; answers at once, during a generation too."""
        return health

    return app


def _most_steps(scheduler: Any) -> int:
    """How many steps a scheduler was trained on; one of continuous time has no such number."""
    return int(getattr(scheduler.config, "num_train_timesteps", None) or MAX_STEPS)


def _require_steps(pipe: SamplingPipeline, job: Job) -> None:
    """Refuses steps that the scheduler does not take, before the request waits in the line.

    Raises:
        ApiError: 422 with the scheduler's own words.
    """
    try:
        require_steps(pipe.scheduler, job.num_inference_steps)
    except TrainingError as error:
        message = f"num_inference_steps: {job.num_inference_steps}, {error.found}. {error.do}"
        raise ApiError(422, message, param="num_inference_steps", code="invalid_value") from None


def _sample(pipe: SamplingPipeline, job: Job) -> tuple[list[ImageDatum], float]:
    """The images of a job, and the seconds they took."""
    start = time.perf_counter()
    samples = sample_images(
        pipe,
        [job.label] * len(job.seeds),
        job.seeds,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        eta=job.eta,
        batch_size=len(job.seeds),
        prompts=job.prompts,
        negative_prompt=job.negative_prompt,
    )
    pngs = [png_from_pil(pil_from_tensor(image)) for image in samples.images]
    data = [
        ImageDatum(b64_json=base64.b64encode(png).decode("ascii"), revised_prompt=job.drawn, seed=seed)
        for png, seed in zip(pngs, job.seeds, strict=True)
    ]
    return data, round(time.perf_counter() - start, 6)


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


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _error_response(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))

    @app.exception_handler(HqcError)
    async def model_failed(_: Request, error: HqcError) -> JSONResponse:
        logger.error("generation failed: %s", error)
        return _error_response(ApiError(500, str(error), code="generation_failed"))

    @app.exception_handler(Exception)
    async def crashed(_: Request, error: Exception) -> JSONResponse:
        # The exception goes on to uvicorn, which logs it and closes the connection: a client that was not told
        # would send its next request into a connection that is being reset.
        message, headers = "internal error; the server's log has it", {"Connection": "close"}
        return _error_response(ApiError(500, message, code="internal_error", headers=headers))


def _error_response(error: ApiError) -> JSONResponse:
    kinds = {429: "rate_limit_error", 500: "server_error"}
    body = ErrorBody(
        message=error.message,
        type=kinds.get(error.status, "invalid_request_error"),
        param=error.param,
        code=error.code,
    )
    return JSONResponse(ErrorResponse(error=body).model_dump(), status_code=error.status, headers=error.headers)


def _hqc_version() -> str:
    try:
        return version("hqc")
    except PackageNotFoundError:
        return "unknown"
