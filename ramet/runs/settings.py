"""Configuration: presets and TOML files with dotted overrides, validated before anything runs.

    load(RunConfig, Path("run.toml"), ["train.updates=50", "penalty.generated=0.001"])
    load(RunConfig, "nano", ["seed=1"])

The defaults are neutral for a language model; a recipe is a preset (`ramet/presets`) or a file, and states every value that it relies on.

An unknown key, a wrong type or an impossible value is one line that names the key and what is allowed.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from ramet.agents.budget import Budget
from ramet.agents.transcripts import LIMIT
from ramet.attention.settings import AttentionConfig
from ramet.env.registry import AnyEnv
from ramet.errors import ConfigError
from ramet.imports import provenance
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.openrlhf.settings import ClusterConfig
from ramet.policy.training.reward import RewardConfig
from ramet.policy.training.update import TrainConfig
from ramet.rewards.penalty import Prices
from ramet.runs.presets import preset_names, read_settings, source_name
from ramet.runs.renamed import check_renamed
from ramet.schema import Section, Settings, takes
from ramet.storage import write_text

_Config = TypeVar("_Config", bound=BaseModel)
_Tokens = Annotated[int, Field(ge=1)]


class EvalConfig(Section):
    """What `ramet eval` and the reports measure."""

    tasks: _Tokens = 100
    """Tasks of each split."""
    budgets: Annotated[tuple[_Tokens, ...], Field(min_length=1)] = (256, 512, 1024, 2048)
    """Limits on generated tokens for the tasks as trained."""
    ood_budgets: Annotated[tuple[_Tokens, ...], Field(min_length=1)] = (256, 512, 1024, 2048)
    """The same for tasks out of distribution."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy."""
    repeats: _Tokens = 1
    """Times that every task is sampled, each time with seeds of its own."""
    seed: int = 1_000_003
    """Added to `seed` to draw the tasks that are measured."""


class ServerConfig(Section):
    """How the server at `url` is spoken to. A run may go on at another address, with other limits on requests and waiting."""

    model: str = ""
    """Its name for what it serves; by default the policy's name (chat, responses), or its only model (completions)."""
    concurrency: _Tokens = 64
    """Requests at a time; 1 for servers that drop a stream when another request comes."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of silence before a request counts as failed."""
    startup_timeout: Annotated[float, Field(ge=0)] = 180.0
    """Seconds that a server which is not up yet is waited for."""
    names: dict[str, str] = Field(default={})
    """Its names for fields that it calls otherwise, such as { max_tokens = "max_completion_tokens" }; "" leaves a field out."""
    extra_body: dict[str, Any] = Field(default={})
    """Fields to send besides, such as { reasoning_effort = "low" }."""
    headers: dict[str, str] = Field(default={})
    """Headers to send besides; of what is nobody else's business only the name of an environment variable, { api-key = "$AZURE_KEY" }."""
    fold_system: bool = False
    """The system message goes into the first message of the user."""

    @model_validator(mode="after")
    def _no_secret(self) -> ServerConfig:
        if exposed := [name for name, value in self.headers.items() if _SECRET.search(name) and not value.startswith("$")]:
            raise ValueError(f"headers.{exposed[0]} is written to the run folder; give the name of an environment variable, $NAME")
        return self


_Backend = Literal["transformers", "vllm", "completions", "chat", "responses"]
NAMING = ("chat", "responses")
"""Backends that know a model by the name that a server has for it; nothing of it is here."""
_SERVERS = ("completions", *NAMING)
_Chat = Literal["auto", "nano", "chatml", "template"]


class RoleConfig(Section):
    """A role that a call of `spawn_clone` may give to a clone. What is left out is as for a clone of the model."""

    model: str = ""
    """A model of its own, as in `model`; of a server (chat, responses), its name for it."""
    backend: _Backend = "transformers"
    """What samples its model."""
    url: str = ""
    """Address of an OpenAI-compatible server that samples it."""
    chat: _Chat = "auto"
    """How messages become tokens of its model."""
    system: str | None = None
    """Its instructions."""
    tools: tuple[str, ...] | None = None
    """The tools that it holds."""
    description: str = ""
    """What it is for, as the calling model reads it."""
    trainable: bool | None = None
    """Train on its tokens? By default yes, unless it has a model of its own, which is never trained."""

    @property
    def own(self) -> bool:
        """Has it a model of its own?"""
        return bool(self.model or self.url)

    @model_validator(mode="after")
    def _whole(self) -> RoleConfig:
        if bool(self.url) != (self.backend in _SERVERS):
            raise ValueError(f"url and a backend that is a server ({', '.join(_SERVERS)}) go together")
        if (self.backend != "transformers" and not self.own) or (self.backend == "completions" and not self.model):
            raise ValueError(f"the backend {self.backend} needs a model")
        if self.own and self.trainable:
            raise ValueError("only the run's own model is trained: leave trainable out, or leave model and url out")
        _check_address(self.url)
        return self


_SECRET = re.compile(r"key|token|secret|password|passwd|^pwd$|^sig|auth", re.IGNORECASE)
"""Parameters of an address that are nobody else's business."""


def _check_address(url: str, key: str = "url", instead: str = "; put the key into OPENAI_API_KEY") -> None:
    """Raise `ValueError` for an address with a secret, for it is written down."""
    address = urlsplit(url)
    if address.username or address.password or any(_SECRET.search(name) for name, _ in parse_qsl(address.query)):
        raise ValueError(f"{key} holds a key or a user, and is written to the run folder{instead}")


class RunConfig(Section):
    """One run: what learns, on what, under which budgets."""

    model: str
    """"nano" (shipped), "smollm2-135m" (`ramet models get`), a model directory, or hf:owner/name."""
    backend: _Backend = "transformers"
    """What samples: transformers, vllm (an engine in this process), completions, chat or responses (a server at `url`)."""
    url: str = ""
    """Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1. It is written down: no place for a key."""
    server: ServerConfig = ServerConfig()
    chat: _Chat = "auto"
    """How messages become tokens: the model's own template, or one by name; auto chooses."""
    seed: int = 0
    """Seeds everything that is drawn at random."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of torch; by default as many as torch chooses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights."""
    env: AnyEnv
    attention: AttentionConfig = AttentionConfig()
    budget: Budget = Budget()
    budgets: tuple[_Tokens, ...] = ()
    """Limits on generated tokens; each training task draws its `budget.generated` from these, where there are any."""
    penalty: Prices = Prices()
    train: TrainConfig = TrainConfig()
    reward: RewardConfig = RewardConfig()
    openrlhf: ClusterConfig = ClusterConfig()
    tell_budget: Literal["all", "holders"] = "all"
    """Who is told in the prompt what may be spent: all branches, or only holders of the tool, where small models take the line for part
    of the question. Methods are then compared fairly only with others that hold the tool."""
    tools: tuple[str, ...] = ()
    """What branches may call beside `spawn_clone`: functions by import path, such as ["package.module:function"], or what is built in:
    read and search (documents of the task), budget (what is left), calculator, python (in a sandbox)."""
    mcp: tuple[str, ...] = ()
    """MCP servers whose tools they may call too: commands, which run for as long as the run, or URLs. They are written down: no place
    for a key."""
    tools_at: Literal["everywhere", "clones", "root"] = "everywhere"
    """Which branches hold them: all, all but the root, or the root alone."""
    program: str = ""
    """A program that decides in the model's place what the root does: "map-reduce", "best-of-n" or another that comes with ramet, or an
    async function by import path, "package.module:function"."""
    roles: dict[str, RoleConfig] = Field(default={})
    """Who clones may be, by the name that a call gives: a section [roles.NAME] for each."""
    eval: EvalConfig = EvalConfig()
    transcript_mib: Annotated[int, Field(ge=0)] = LIMIT // 2**20
    """MiB of trees that the run keeps in `trees.jsonl.gz`, for `ramet show`; 0: none. A run may go on with another limit."""

    @model_validator(mode="after")
    def _some_budget(self) -> RunConfig:
        for name in ("generated", "prefilled", "critical_path", "branch_generated", "turns", "context", "seconds"):
            if getattr(self.budget, name) == 0:
                raise ValueError(f"budget.{name} is 0: nothing could be answered; give it more or leave it out")
        if bool(self.url) != (self.backend in _SERVERS):
            raise ValueError(f"url and a backend that is a server ({', '.join(_SERVERS)}) go together")
        _check_address(self.url)
        for server in self.mcp:
            _check_address(server, "mcp", "; give a command that reads the key from where it is kept")
        if self.attention.method != "dense" and self.backend != "transformers":
            raise ValueError(f"attention.method {self.attention.method} goes with the backend transformers")
        if self.attention.method != "dense" and self.device == "cuda":
            raise ValueError(f"attention.method {self.attention.method} runs on worker processes on the CPU: leave device out, or set cpu")
        if self.budget.generated is not None and self.budgets:
            raise ValueError("budget.generated and budgets both limit generated tokens; set budgets to [] to use the first")
        return self

    @property
    def named_by_server(self) -> bool:
        """Whether the policy is the name that a server has for a model."""
        return self.backend in NAMING

    def identity(self) -> dict[str, Any]:
        """What tells runs apart: all settings but where servers are, how many calls there are at a time, how long they may take, and
        how much is kept.

        Of roles, where there are any, their weights too; the code that settings name is in `code`.
        """
        free: dict[str, Any] = {
            "url": True, "server": {"concurrency", "timeout", "startup_timeout"}, "reward": {"concurrency", "timeout"},
            "roles": {name: {"url"} for name in self.roles}, "transcript_mib": True,
        }  # fmt: skip
        settings = self.model_dump(mode="json", exclude=free)
        if weights := {name: weights_id(find(r.model)) for name, r in self.roles.items() if r.model and r.backend not in NAMING}:
            settings["weights"] = weights
        return {name: value for name, value in settings.items() if name not in _LATER or value != _LATER[name]}

    def code(self) -> list[dict[str, str]]:
        """What tells the code of environments, rewards, tools and programs, where it is not ramet's, from later versions of it."""
        named = [*self.tools, *(path for role in self.roles.values() for path in role.tools or ()), self.program]
        return [provenance(path) for path in dict.fromkeys([*named, self.reward.function, *self.env.code]) if ":" in path]

    @property
    def transcript_bytes(self) -> int:
        """`transcript_mib` in bytes."""
        return self.transcript_mib * 2**20


_LATER: dict[str, Any] = {
    "tools": [], "tools_at": "everywhere", "mcp": [], "program": "", "roles": {}, "reward": {"function": "", "weights": {}},
}  # fmt: skip
"""Settings that runs of before did not have: at these values they are the same runs."""


def load(kind: type[_Config], source: str | Path | None, overrides: Sequence[str] = ()) -> _Config:
    """The settings of a preset (a name) or a file (a path), with `key.sub=value` overrides in order. Raises `ConfigError`."""
    return validate(kind, _data(source, overrides))


def _data(source: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of `source` with the overrides applied, not yet validated."""
    data = {} if source is None else read_settings(source)
    changes: dict[str, Any] = {}
    for override in overrides:
        _apply(changes, override)
    if _other_kind(data, changes):
        del data["env"]
    for override in overrides:
        _apply(data, override)
    return data


def _other_kind(data: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    """Whether the overrides name another environment than `data`, whose options then do not apply."""
    kinds = [section.get("kind") for section in (data.get("env"), changes.get("env")) if isinstance(section, Mapping)]
    return len(kinds) == 2 and kinds[1] not in (None, kinds[0])


def held(path: Path) -> RunConfig:
    """The settings that a run folder holds in `path`. Raises `ConfigError`; for names of before, saying that the run cannot go on."""
    data = read_settings(path)
    try:
        check_renamed(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; such a run cannot go on: choose another --name or remove {path.parent}") from None
    return validate(RunConfig, data)


def traced(source: str | Path | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, str]]:
    """The settings that `load` returns, and where each value comes from: --set, the file, the preset, the environment, or the default."""
    config = load(RunConfig, source, overrides)
    given: dict[str, str] = {}
    if source is not None:
        given = dict.fromkeys(_leaves(read_settings(source)), source_name(source))
    for override in overrides:
        data: dict[str, Any] = {}
        at = _apply(data, override)
        given = {name: origin for name, origin in given.items() if not _within(name, at)} | dict.fromkeys(_leaves(data), "--set")
    origins = {}
    for name, _ in Settings(RunConfig).of(config.model_dump(mode="json")):
        default = f"environment {config.env.kind}" if name.startswith("env.") and name != "env.kind" else "default"
        origins[name] = next((origin for key, origin in reversed(given.items()) if _within(key, name)), default)
    return config, origins


def _within(name: str, section: str) -> bool:
    return f"{name}.".startswith(f"{section}.")


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of what holds a value; an empty table is one."""
    names: list[str] = []
    for key, value in data.items():
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [prefix + key]
    return names


def validate(kind: type[_Config], data: Mapping[str, Any]) -> _Config:
    """`data` with the defaults of what it leaves out. Raises `ConfigError`."""
    check_renamed(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problem_lines = list(dict.fromkeys(_explain(kind, problem) for problem in problems))[:3]
        if any(problem["type"] == "missing" for problem in problems):
            problem_lines.append(f"give what is missing, or begin from a preset: {', '.join(preset_names())}")
        raise ConfigError("; ".join(problem_lines)) from None


def _apply(data: dict[str, Any], override: str) -> str:
    """Sets in `data` what the override says; returns the name that it sets."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    at = data
    for key in keys[:-1]:
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
    at[keys[-1]] = value
    return ".".join(keys)


def _explain(kind: type[BaseModel], problem: Any) -> str:
    where, schema = Settings(kind).at(problem["loc"])
    given = f" (got {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
    if problem["type"] == "value_error":
        return f"{where or 'config'}: {problem['msg'].removeprefix('Value error, ')}{given}"
    if problem["type"] == "missing":
        return f"{where} is missing: it takes {takes(schema)}"
    if problem["type"] == "union_tag_invalid":
        key = problem["ctx"]["discriminator"].strip("'")
        return f"{where}.{key} takes {takes(Settings(kind).at([*problem['loc'], key])[1])} (got {problem['input'][key]!r})"
    if problem["type"] != "extra_forbidden":
        return f"{where or 'config'} takes {takes(schema)}{given}"
    unknown, known = problem["loc"][-1], list(schema.get("properties", ()))
    close = difflib.get_close_matches(str(unknown), known, 1)
    whole = ".".join([*([where] if where else []), str(unknown)])
    return f"unknown key {whole!r}; " + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}")


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, in all sections."""
    return {name: _given(value) if isinstance(value, Mapping) else value for name, value in data.items() if value is not None}


def dumps(config: BaseModel) -> str:
    """The resolved configuration as TOML. TOML has no null: an unlimited budget is spelled out, other defaults are left out."""
    data = config.model_dump(mode="json")
    budget = {name: "unlimited" if value is None else value for name, value in data.get("budget", {}).items()}
    data = _given({name: value for name, value in data.items() if name != "budget"})
    return tomli_w.dumps(data | ({"budget": budget} if budget else {}))


def write(config: BaseModel, path: Path) -> None:
    """`dumps` into a file."""
    write_text(path, dumps(config))
