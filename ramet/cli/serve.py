"""`ramet serve`: delegation behind an ordinary endpoint."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ramet.terminal import messages

BUDGET = "4096"
"""Generated tokens of a request's tree where nothing says how many."""


def serve(
    policy: Annotated[
        str | None, typer.Option(help="nano, the default, or a model directory; of a chat server, its name for the model, else its first.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server that samples.")] = None,
    backend: Annotated[str | None, typer.Option(help="Of --url: chat (default), responses, or completions.")] = None,
    tool: Annotated[
        list[str] | None, typer.Option(help="A function, package.module:function; or read, search, budget, calculator, python.")
    ] = None,
    mcp: Annotated[list[str] | None, typer.Option(help="An MCP server whose tools may be called: a command, or a URL.")] = None,
    program: Annotated[str | None, typer.Option(help="A program that decides in the model's place: package.module:function.")] = None,
    budget: Annotated[
        str | None, typer.Option(help=f"The most that a request may spend: generated tokens, by default {BUDGET}, or limits by name.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels of clones, by default 1; 0: no spawning.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Of requests that give none; 0, the default, is greedy.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="TOML file of settings, or a preset: `ramet config presets`.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting, such as device=cpu. May be repeated.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str, typer.Option(help="The model's name for clients; by default the policy's.")] = "",
    at_once: Annotated[int, typer.Option(min=1, help="Trees that grow at the same time; other requests wait.")] = 16,
) -> None:
    """Answer /v1/chat/completions and /v1/responses with trees of clones, so that any OpenAI client delegates without a change.

    Where the address is not this machine's alone, a bearer token is asked for: RAMET_SERVE_TOKEN, or a new one that is printed.

    Example: ramet serve --policy nano --port 8000
    """
    from ramet.runs.question import question_settings
    from ramet.runs.serving.command import TOKEN, ServeOptions, serve_trees, token_for

    given = {
        "model": policy, "url": url, "backend": backend or ("chat" if url else None), "program": program, "budget.depth": depth,
        "eval.temperature": temperature,
    }  # fmt: skip
    resolved = question_settings(config, set_ or [], budget or (BUDGET if config is None else None), given, tool, mcp)
    environment = os.environ.get(TOKEN, "")
    token = token_for(host, environment)
    bearer = "" if not token else f", bearer token of {TOKEN}" if environment else f", bearer {token}"
    messages.print(f"serving on http://{host}:{port}/v1{bearer}")
    serve_trees(resolved, ServeOptions(host, port, token, name, at_once))
