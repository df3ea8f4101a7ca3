"""The pages and the answers: below a secret path, to this machine alone, and nothing is ever written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.serve.live_model import KINDS, Change, LiveModel
from tcsae.shared.base.errors import ConfigError, TcsaeError
from tcsae.shared.sae.folder import METRICS, read_metrics, run_folders

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HERE = Path(__file__).parent / "page"
HOSTS = ["127.0.0.1", "localhost"]
"""Names that a request may call this machine by: a page of elsewhere that resolves to it has another."""
MAX_BYTES = 100_000
"""Of a request."""
MAX_POINTS = 300
"""Of a training curve."""


def application(model: LiveModel, runs_path: Path, report: Path, token: str) -> "Starlette":
    """Everything below /TOKEN/: the live page, the report's files below report/, and the answers below answer/."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    answers = {
        "runs": lambda _: _runs(model),
        "read": lambda asked: _read(model, asked),
        "change": lambda asked: _change(model, asked),
    }
    below = [
        Route("/", _file("live.html", "text/html")),
        Route("/live.js", _file("live.js", "text/javascript")),
        Route("/training.js", _file("training.js", "text/javascript")),
        *(Route(f"/answer/{name}", _answer(function), methods=["POST"]) for name, function in answers.items()),
        Route("/answer/training", _answer(lambda _: training_curves(runs_path)), methods=["POST"]),
        Mount("/report", StaticFiles(directory=report, html=True)),
    ]
    return Starlette(
        routes=[Mount(f"/{token}", routes=below)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )


def _file(name: str, kind: str) -> Callable[["Request"], "Response"]:
    from starlette.responses import Response

    def answer(request: "Request") -> Response:  # noqa: ARG001
        return Response((HERE / name).read_bytes(), media_type=kind)

    return answer


def _answer(function: Callable[[dict[str, Any]], Any]) -> Callable[["Request"], Any]:
    """JSON in, JSON out; what is wrong with a question comes back as {"error": ...} with status 400."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

    async def answer(request: "Request") -> JSONResponse:
        try:
            return JSONResponse(await run_in_threadpool(function, await _question(request)))
        except TcsaeError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    return answer


async def _question(request: "Request") -> dict[str, Any]:
    """Raises ConfigError for what is no JSON object, or too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise ConfigError(f"The question is over {MAX_BYTES:,} bytes. Give a shorter text.")
    try:
        asked = json.loads(body or b"{}")
    except ValueError as error:
        raise ConfigError(f"The question is no JSON ({error}).") from error
    if not isinstance(asked, dict):
        raise ConfigError(f"The question is a JSON {type(asked).__name__}; an object is needed.")
    return asked


def _value(asked: dict[str, Any], name: str, kind: type) -> Any:
    """Raises ConfigError if it is missing or something else."""
    value = asked.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}; it has to be of type {kind.__name__}.")
    return value


def _runs(model: LiveModel) -> dict[str, Any]:
    runs = [
        {
            "name": one.name,
            "hook": one.hook,
            "n_latents": one.loaded.sae.config.d_sae,
            "skip_first": one.skip_first,
            "weights": one.evaluation["weights"],
        }
        for one in model.runs.values()
    ]
    return {"runs": runs, "max_tokens": model.limit, "changes": list(KINDS)}


def _read(model: LiveModel, asked: dict[str, Any]) -> dict[str, Any]:
    reading = model.read(_value(asked, "run", str), _value(asked, "text", str))
    tokens = [model.texts[token] for token in reading.ids]
    return {"tokens": tokens, "latents": reading.latents, "active": reading.n_active}


def _change(model: LiveModel, asked: dict[str, Any]) -> dict[str, Any]:
    change = Change(
        kind=_value(asked, "kind", str), latent=_value(asked, "latent", int), value=_value(asked, "value", float)
    )
    changed = model.change(
        _value(asked, "run", str), _value(asked, "text", str), change, _value(asked, "n_continued", int)
    )
    return {
        "kl": [round(value, 5) for value in changed.kl],
        "promoted": [[model.texts[token], round(value, 4)] for token, value in changed.promoted],
        "suppressed": [[model.texts[token], round(value, 4)] for token, value in changed.suppressed],
        "clean": [model.texts[token] for token in changed.clean],
        "changed": [model.texts[token] for token in changed.changed],
    }


def training_curves(runs_path: Path) -> dict[str, Any]:
    """The logged steps of every run that has any, unfinished ones too: read anew each time, thinned to MAX_POINTS."""
    curves = []
    for path in run_folders(runs_path):
        if not (path / METRICS).is_file():
            continue
        lines = [line for line in read_metrics(path) if "event" not in line]
        every = max(1, -(-len(lines) // MAX_POINTS))
        kept = [line for i, line in enumerate(lines) if i % every == 0 or i == len(lines) - 1]
        names = ("step", "explained_variance", "loss", "l0", "dead_fraction", "adjacent_correlation")
        curves.append({"name": path.name} | {name: [line.get(name) for line in kept] for name in names})
    return {"curves": [curve for curve in curves if curve["step"]]}
