"""Loading everything, and a server for this machine alone."""

import secrets
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import click

from tcsae.evaluate.report.features.shown_feature import MARK
from tcsae.evaluate.report.pages.page_files import choose_runs
from tcsae.harvest.language_model import stored_model
from tcsae.serve.application import application
from tcsae.serve.live_model import LiveModel
from tcsae.shared.base.console import legible, say
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.store.reader import open_store

HOST = "127.0.0.1"
EXTRA = "starlette and uvicorn are missing. Install them: pip install 'tcsae[serve]'"
WARM_UP = "the first answer loads what later ones have "


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRequest:
    """What is asked for on the command line."""

    runs_path: Path
    report: Path
    names: Collection[str] = ()
    model: str | None = None
    port: int = 0
    """0: a free one."""


def start(location: str, request: ServeRequest) -> None:
    """Serve until interrupted.

    Raises ConfigError without the libraries or with a port that is taken, RunError without a report, StoreError without
    a store, ModelError without the language model.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    if not (request.report / MARK).is_file():
        raise RunError(f"{request.report} is no report. Write one: tcsae report")
    store = open_store(location)
    included, excluded = choose_runs(store, request.runs_path, request.names)
    for one in excluded:
        say(f"{one.name}: left out. {one.why}")
    listener = _listen(request.port)
    with listener:
        live = LiveModel(store, included, stored_model(store.manifest.recipe, request.model))
        warm_up(live)
        token = secrets.token_urlsafe(16)
        click.echo(f"Serving {legible(str(request.report))}: http://{HOST}:{listener.getsockname()[1]}/{token}/")
        app = application(live, request.runs_path, request.report, token)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def warm_up(live: LiveModel) -> None:
    """A first pass, through an SAE that can be read token by token, if there is one."""
    began, n, readable = time.perf_counter(), len(live.runs), live.readable
    if not readable:
        say(f"None of {n} SAEs can be read token by token: their codes are of several tokens. The report is served.")
        return
    live.read(readable[0], WARM_UP)
    hook = live.runs[readable[0]].hook
    say(f"{n} SAEs at {hook}; a first pass took {time.perf_counter() - began:.2f} s.")


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # who follows the address at once waits for the server instead of being refused
    except OSError as error:
        listener.close()
        raise ConfigError(f"Port {port} cannot be taken ({error.strerror}). Give another --port.") from error
    return listener
