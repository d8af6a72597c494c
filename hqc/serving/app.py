"""The HTTP application: an OpenAI-shaped images API over one model."""

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hqc.errors import RuntimeMissingError
from hqc.serving.backend import Backend
from hqc.serving.engine import Engine, Policy
from hqc.serving.errors import ApiError
from hqc.serving.limits import Limits
from hqc.serving.offer import Offer, request_schema, takes
from hqc.serving.requests import request_from_body
from hqc.serving.schemas import EVENT_SCHEMA, ErrorResponse, GenerationResponse, Health, ModelCard, ModelList

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from prometheus_client import CollectorRegistry  # noqa: F401 - that it is there
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
except ModuleNotFoundError as error:
    raise RuntimeMissingError(
        "hqc serve", "fastapi, uvicorn or prometheus-client is not installed", "pip install 'hqc[serve]'"
    ) from error

from hqc.serving.generation import Generations, Left, body_of
from hqc.serving.guards import Guards, RequestIds, Rules, error_body
from hqc.serving.metrics import CONTENT_TYPE, EngineMetrics, ServerMetrics
from hqc.serving.pages import add_pages

__all__ = ["Served", "create_app"]

CLIENT_LEFT = 499
EXPOSED = ["Retry-After", "x-request-id", "x-should-retry"]  # headers of answers that a page of another origin may read

logger = logging.getLogger(__name__)

_TEXT = {
    400: "The body is no JSON, or a field is wrong: error.param names it",
    401: "The API key is missing or wrong",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    421: "The server is not called by this name",
    429: "Too many requests wait; see Retry-After",
    500: "The model failed",
    503: "The server is shutting down",
    504: "The images took too long",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _TEXT.items()
}
_STREAM = {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}


@dataclass(frozen=True)
class Served:
    """One model that is served: what draws, how it is called in answers, and what its denoiser runs on.

    lanes: calls of the denoiser side by side.
    """

    backend: Backend
    name: str
    runtime: str
    lanes: int = 1


def create_app(
    served: Sequence[Served],
    *,
    limits: Limits | None = None,
    rules: Rules | None = None,
    policy: Policy = "adaptive",
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """An application that draws with one model, or with several that a request chooses among by `model`.

    Routes: `POST /v1/images/generations`, `GET /v1/models`, `/v1/models/{id}`, `/health`, `/ready`, `/metrics`; a page
    to draw on at `/`, the reference at `/docs`. Errors have OpenAI's shape. The engines are `app.state.engines`.

    Args:
        served: at least one, of different names; the first is asked where a request names none of them.
        limits: what a request may ask for, of every model.
        rules: who may ask.
        policy: how images share calls of the denoiser.
        cors_origins: pages of other origins that may ask from a browser; none by default.

    Raises:
        RuntimeMissingError: on import of this module, when FastAPI is not installed.
    """
    limits, rules, metrics = limits or Limits(), rules or Rules(), ServerMetrics()
    models = {each.name: _generations(each, limits, policy, metrics) for each in served}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models.values():
            model.engine.drain(0)

    title = f"hqc: {served[0].name}"
    # Without FastAPI's own pages, which load scripts of another host.
    app = FastAPI(title=title, version=_hqc_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engines = [model.engine for model in models.values()]
    _add_error_handlers(app)
    _add_generations(app, models, limits)
    _add_models(app, [ModelCard(id=name, created=int(time.time())) for name in models])
    _add_operations(app, models, metrics)
    add_pages(app)
    app.add_middleware(Guards, rules=rules)
    if cors_origins:  # around the guards: a page may read why it is refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_middleware(RequestIds)
    return app


def _generations(served: Served, limits: Limits, policy: Policy, metrics: ServerMetrics) -> Generations:
    backend, observer = served.backend, EngineMetrics(metrics, served.name)
    limits = replace(limits, max_steps=min(limits.max_steps, backend.most_steps))
    engine = Engine(
        backend.denoise,
        lanes=served.lanes,
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        policy=policy,
        around=backend.around,
        observer=observer,
    )
    metrics.watch(served.name, engine)
    offer = Offer(backend.needs, limits, backend.schedulers, backend.previews, backend.loras)
    return Generations(engine, backend, offer, observer, served.name, served.runtime)


def _add_generations(app: FastAPI, models: Mapping[str, Generations], limits: Limits) -> None:
    first = next(iter(models.values()))
    schema = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": request_schema(first.offer)}}}
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": GenerationResponse, "content": _STREAM, "description": "The images, or their stream"}
    }

    @app.post("/v1/images/generations", responses={**answers, **REFUSALS}, openapi_extra=schema, response_model=None)
    async def generate(request: Request) -> Response | GenerationResponse:
        """Images of a prompt, of a class, or of nothing in particular, in base64; with `stream`, as events."""
        try:
            asked = request_from_body(await body_of(request, limits))
            model = models.get(asked.model or "", first)
            job = await model.job(asked)
            if not job.stream:
                return await model.answer(request, job)
            events = await model.events(job)
        except Left:
            return Response(status_code=CLIENT_LEFT)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _add_models(app: FastAPI, cards: Sequence[ModelCard]) -> None:
    @app.get("/v1/models", responses={401: REFUSALS[401], 421: REFUSALS[421]})
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=list(cards))

    unknown = {"model": ErrorResponse, "description": "There is no such model"}

    @app.get("/v1/models/{model}", responses={401: REFUSALS[401], 404: unknown, 421: REFUSALS[421]})
    async def model_of(model: str) -> ModelCard:
        """The model of this name."""
        found = next((card for card in cards if card.id == model), None)
        if found is None:
            known = ", ".join(card.id for card in cards)
            raise ApiError(404, f"no model is called that; there is {known}", param="model", code="model_not_found")
        return found


def _add_operations(app: FastAPI, models: Mapping[str, Generations], metrics: ServerMetrics) -> None:
    first = next(iter(models.values()))

    def health() -> Health:
        return Health(
            status="ok" if _alive() else "stopping",
            model=first.model,
            runtime=first.runtime,
            hqc=app.version,
            running=sum(model.engine.running for model in models.values()),
            waiting=sum(model.engine.waiting for model in models.values()),
            takes=takes(first.offer),
            models=list(models),
        )

    def _alive() -> bool:
        return all(model.engine.alive for model in models.values())

    @app.get("/health", responses={421: REFUSALS[421]})
    async def healthy() -> Health:
        """The process answers, during a generation too; and what the first model takes."""
        return health()

    @app.get("/ready", responses={421: REFUSALS[421], 503: {"model": Health, "description": "Not now"}})
    async def ready(response: Response) -> Health:
        """Whether a request would be taken now: 503 while the server shuts down, or after a fault of its engine."""
        response.status_code = 200 if _alive() else 503
        return health()

    @app.get("/metrics", response_class=Response, responses={421: REFUSALS[421]})
    async def measured() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.page(), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _error_response(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))


def _error_response(error: ApiError) -> JSONResponse:
    if error.status >= 500:
        logger.error("answered %d: %s", error.status, error.message)
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)


def _hqc_version() -> str:
    try:
        return version("hqc")
    except PackageNotFoundError:
        return "unknown"
