"""`ramet env`: environments that are installed, a check of one, and the beginning of a package with one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ramet.cli.bench import Json
from ramet.errors import ConfigError
from ramet.terminal import Table, show

env = typer.Typer(help="Environments: tasks with their grading. Example: ramet env list", no_args_is_help=True)


@env.command("list")
def list_(json: Json = None) -> None:
    """Print the environments that `--env` takes, and what is wrong with those that cannot be used.

    Example: ramet env list
    """
    from ramet.runs.environments import installed
    from ramet.storage import write_json

    rows = installed()
    if json is not None:
        write_json(json, [{"record": "environment", "name": name, "from": origin, "about": about} for name, origin, about in rows])
    table = Table("environment", "from", "about")
    for row in rows:
        table.add_row(*row)
    show(table)


@env.command("check")
def check_(
    name: Annotated[str, typer.Argument(help="As for --env: a name that `ramet env list` prints, or package.module:name.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of env or reward, such as env.options.sides=8. May be repeated.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of each split to look at.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    json: Json = None,
) -> None:
    """Exercise an environment without a model: tasks, seeds, splits, grading, sizes and prompts. The status is 0 if all is well.

    Example: ramet env check rows
    """
    from ramet.env.check import check
    from ramet.runs.settings import RunConfig, load
    from ramet.storage import write_json

    config = load(RunConfig, None, ["model=nano", f"env.kind={name}", *(set_ or [])])
    findings = list(check(config.env, config.reward, tasks, seed))
    table = Table("check", "", "found")
    for finding in findings:
        table.add_row(finding.check, "problem" if finding.problem else "well", finding.problem or finding.seen)
    show(table)
    if json is not None:
        write_json(json, [{"record": "finding", "check": f.check, "seen": f.seen, "problem": f.problem} for f in findings])
    problems = [finding for finding in findings if finding.problem]
    _print_first(config)
    if problems:
        raise ConfigError(f"{len(problems)} of {len(findings)} checks of {name} found a problem; the first: {problems[0].problem}")


def _print_first(config: Any) -> None:
    from rich.text import Text

    from ramet.errors import RametError

    try:
        task = config.env.build().tasks("train", 1, 0)[0]
    except RametError:
        return
    show(Text("\nThe first task to train on:", style="bold"))
    for message in task.messages:
        show(Text(f"{message.role}: {message.content[:2000]}"), soft_wrap=True)
    show(Text(f"reference: {str(task.reference)[:200]}"), soft_wrap=True)


@env.command("init")
def init(
    name: Annotated[str, typer.Argument(help="Name of the package, such as my-sums.")],
    into: Annotated[Path, typer.Option("--into", help="Folder in which its folder is made.")] = Path("."),
) -> None:
    """Write an installable package with an environment, ready to be changed, and its test.

    Example: ramet env init my-sums
    """
    from ramet.runs.environments import write_package

    folder, module = write_package(name, into)
    show(f"{folder} is written. Change {folder / module / '__init__.py'}, then")
    show(f"  cd {folder}; pip install -e . && ramet env check {name}")
    show(f"or, without an install, in that folder: ramet env check {module}:environment")
