"""`ramet serve`: the settings of `ramet run`, behind an address."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Sampling
from ramet.errors import ConfigError, require
from ramet.runs.build import open_engine
from ramet.runs.equipment import equipment_of
from ramet.runs.question import model_of
from ramet.runs.settings import RunConfig

TOKEN = "RAMET_SERVE_TOKEN"
"""The environment variable that has the bearer token."""


@dataclass(frozen=True)
class ServeOptions:
    """Where and to whom something is served. `name` is the model's for clients; `token` is what they bring, "" for none."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    name: str = ""
    at_once: int = 16


def token_for(host: str, given: str) -> str:
    """The token that is given, or a new one where an address is not this machine's alone; "" for none."""
    try:
        alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    return given or ("" if alone else secrets.token_urlsafe(24))


def serve_trees(config: RunConfig, address: ServeOptions) -> None:
    """Serve until interrupted. Raises `ConfigError` for settings that cannot be served, and an address that cannot be had."""
    require("starlette", "ramet serve")
    require("uvicorn", "ramet serve")
    from ramet.runs.serving.server import DelegationService
    from ramet.web import run_app

    if config.attention.method != "dense":
        raise ConfigError(f"attention.method {config.attention.method} is not served; leave it out")
    model = model_of(config)
    equipment = equipment_of(config, open_engine)
    engine, chat, _ = open_engine(config, model)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Runtime]:
        async with engine, equipment.serving() as serving:
            sampling = Sampling(temperature=config.eval.temperature)
            yield serving.runtime(engine, chat, sampling, always_show_budget=config.tell_budget == "all")

    name = address.name or Path(config.model).name or "ramet"
    service = DelegationService(opened, name, config.budget, address.token, address.at_once)
    run_app(service.app(), address.host, address.port)
