"""Configuration: TOML files with dotted overrides, validated before anything runs.

    load(RunConfig, Path("run.toml"), ["train.updates=50", "reward.generated=0.001"])

An unknown key, a wrong type or an impossible value is one line that names the key and what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ramet.agents.budget import Budget
from ramet.env.arithmetic import KEYS, ReferenceEnvironment, RowsEnvironment
from ramet.env.environment import Environment
from ramet.env.gym import GymEnvironment
from ramet.env.maths import MathsEnvironment
from ramet.env.multihop import MultihopEnvironment, words
from ramet.errors import ConfigError
from ramet.policy.openrlhf.settings import ClusterConfig
from ramet.policy.training.update import TrainConfig
from ramet.rewards.penalty import Prices
from ramet.schema import Settings, takes
from ramet.storage import read_text, write_text

_Config = TypeVar("_Config", bound=BaseModel)
_Tokens = Annotated[int, Field(ge=1)]


TOKEN = "RAMET_REWARD_TOKEN"
"""The environment variable that holds the bearer token of a reward server."""
_MATHS = ("gsm8k", "math", "aime", "amc")
_MULTIHOP = ("hotpotqa", "2wikimultihopqa", "musique")
_FILES = ("data", "train", "ood", "fields", "allow_overlap")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "longvideo": (*_FILES, "metric", "videos", "seconds", "root_sees", "frames", "pixels", "reward_model", "reward_patience"),
    "rows": ("operands", "ood_operands", "row", "largest"),
    "reference": ("graded",),
    "gym": ("task", "options"),
    **dict.fromkeys(_MATHS, (*_FILES, "levels", "last_year")),
    **dict.fromkeys(_MULTIHOP, (*_FILES, "metric", "show", "only_gold", "tokens", "ood_tokens", "gold")),
}
"""The options that belong to each environment."""


class EnvConfig(BaseModel):
    """The environment. Ranges are inclusive.

    rows        operands, ood_operands, row, largest: see `ramet.env.arithmetic`
    reference   graded
    gym         task: a name of reasoning-gym; options: of its generator
    data sets   data, train, ood: a file or hub id for what is measured, trained on, and out of distribution; fields: the field map;
                allow_overlap: questions may be both trained on and measured
      gsm8k, math, aime, amc               levels, last_year: see `ramet.env.maths`
      hotpotqa, 2wikimultihopqa, musique   metric, show, only_gold, tokens, ood_tokens, gold: see `ramet.env.multihop`
      longvideo   metric, videos, seconds, root_sees: see `ramet.env.longvideo`; frames, pixels: what a model sees of a segment, at most;
                  reward_model: the directory of a VideoDRM or of a model that judges, or the address of `ramet reward serve`;
                  reward_patience: seconds for which a server that is away is waited for
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rows", "reference", "gym", "gsm8k", "math", "aime", "amc", "hotpotqa", "2wikimultihopqa", "musique", "longvideo"] = (
        "rows"
    )
    operands: tuple[int, int] = (2, 24)
    ood_operands: tuple[int, int] = (48, 54)
    row: tuple[int, int] = (5, 6)
    largest: Annotated[int, Field(ge=1, le=99)] = 9
    graded: bool = True
    task: str = ""
    options: dict[str, Any] = {}
    data: str = ""
    train: str = ""
    ood: str = ""
    fields: dict[str, str] = {}
    allow_overlap: bool = False
    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = ()
    last_year: int | None = None
    metric: Literal["em", "f1", "reward"] = "em"
    show: Literal["documents", "titles"] = "documents"
    only_gold: bool = False
    tokens: _Tokens | None = None
    ood_tokens: _Tokens | None = None
    gold: Literal["as is", "start", "middle", "end", "random"] = "as is"
    videos: str = ""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    root_sees: Literal["index", "video"] = "index"
    frames: _Tokens = 16
    pixels: Annotated[int, Field(ge=28 * 28)] = 128 * 28 * 28
    reward_model: str = ""
    reward_patience: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ranges(self) -> EnvConfig:
        for name in ("operands", "ood_operands", "row"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be two lengths from 1 on, the smaller first")
        if max(self.operands[1] / self.row[0], self.ood_operands[1] / self.row[1]) > len(KEYS):
            raise ValueError(f"a sum has at most {len(KEYS)} rows; make operands shorter or row longer")
        return self

    @model_validator(mode="after")
    def _belongs(self) -> EnvConfig:
        for name, field in type(self).model_fields.items():
            if name != "kind" and name not in _OPTIONS[self.kind] and getattr(self, name) != field.default:
                raise ValueError(f"{name} does not belong to the environment {self.kind}, which takes {', '.join(_OPTIONS[self.kind])}")
        if self.metric not in ("em", "reward" if self.kind == "longvideo" else "f1"):
            raise ValueError(f"metric {self.metric} does not belong to the environment {self.kind}")
        if self.kind == "gym" and not self.task:
            raise ValueError("task names no task of reasoning-gym, such as leg_counting")
        return self

    @property
    def measurable(self) -> bool:
        """Is there anything to be measured on?"""
        return "data" not in _OPTIONS[self.kind] or bool(self.data or self.ood)

    def check_measurable(self) -> None:
        """Raises `ConfigError` if there is nothing to be measured on."""
        if not self.measurable:
            raise ConfigError("env.data names no file or data set: give --data")

    @property
    def language(self) -> bool:
        """Does the environment ask questions in words, so that a method has to say how they are to be answered?"""
        return self.kind != "rows"

    def files(self) -> dict[str, str]:
        """SHA-256 of the local files that tasks are made of: a journal of other rows is not this job's."""
        paths = {name: Path(getattr(self, name)) for name in ("data", "train", "ood") if getattr(self, name)}
        if self.reward_model:
            paths |= {f"reward_model/{name}": Path(self.reward_model) / name for name in ("model.safetensors", "video_drm.json")}
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.is_file()}

    def look(self) -> Any:
        """How a model that sees looks at videos."""
        from ramet.policy.engines.vision import Look

        return Look(frames=self.frames, most=self.pixels)

    @property
    def multihop(self) -> bool:
        """Are there documents?"""
        return self.kind in _MULTIHOP

    def build(self, count: Callable[[str], int] = words) -> Environment:
        """The environment; `count` gives the tokens of a text."""
        sources = {"iid": self.data, "train": self.train, "ood": self.ood or (self.data if self.ood_tokens else "")}
        common = (sources, self.fields, self.kind, self.allow_overlap)
        if self.kind in _MULTIHOP:
            scored: Any = self.metric
            return MultihopEnvironment(*common, scored, self.show, self.only_gold, self.tokens, self.ood_tokens, self.gold, count)
        if self.kind == "longvideo":
            from ramet.env.longvideo import LongVideoEnvironment, reward_of

            videos = Path(self.videos) if self.videos else None
            token = os.environ.get(TOKEN, "")
            reward = reward_of(self.reward_model, videos, token, self.look(), self.reward_patience) if self.reward_model else None
            metric: Any = self.metric
            return LongVideoEnvironment(*common, self.seconds, self.root_sees, metric, reward, videos)
        if self.kind in _MATHS:
            return MathsEnvironment(*common, self.levels, self.last_year)
        if self.kind == "gym":
            return GymEnvironment(self.task, self.options)
        if self.kind == "reference":
            return ReferenceEnvironment(self.graded)
        return RowsEnvironment(self.operands, self.ood_operands, self.row, self.largest)


class EvalConfig(BaseModel):
    """What `ramet eval` and the reports measure.

    repeats  times that every task is sampled, each time with seeds of its own
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: _Tokens = 300
    budgets: Annotated[tuple[_Tokens, ...], Field(min_length=1)] = (48, 64, 96, 128, 160, 192, 256)
    ood_budgets: Annotated[tuple[_Tokens, ...], Field(min_length=1)] = (256, 320, 384, 448, 512, 640, 768)
    temperature: Annotated[float, Field(ge=0)] = 0.0
    repeats: _Tokens = 1
    seed: int = 1_000_003


class AttentionConfig(BaseModel):
    """How long contexts are read when a policy is measured: sequence-parallel on several worker processes of this machine.

    method     dense: by one process, exactly
    hosts      worker processes
    threshold  prompts of more tokens are read with the method, others exactly
    anchor, passing  rows that every block sees and that a block passes on; None: shares of the context
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["dense", "spava", "apb", "star"] = "dense"
    hosts: Annotated[int, Field(ge=1)] = 2
    threshold: Annotated[int, Field(ge=0)] = 4096
    anchor: Annotated[int, Field(ge=0)] | None = None
    passing: Annotated[int, Field(ge=0)] | None = None


class ServerConfig(BaseModel):
    """How the server at `url` is spoken to. A run may go on at another address, with other limits on requests and waiting.

    model        its name for what it serves; by default the policy's name (chat), or its only model (completions)
    in_flight    requests at a time; 1 for servers that drop a stream when another request comes
    seconds      longest silence before a request counts as failed
    wait         seconds that a server which is not up yet is waited for
    names        its names for fields that it calls otherwise, such as { max_tokens = "max_completion_tokens" }; "" leaves a field out
    extra        fields to send besides, such as { reasoning_effort = "low" }
    fold_system  the system message goes into the first message of the user
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    in_flight: _Tokens = 64
    seconds: Annotated[float, Field(gt=0)] = 300.0
    wait: Annotated[float, Field(ge=0)] = 180.0
    names: dict[str, str] = {}
    extra: dict[str, Any] = {}
    fold_system: bool = False


_SECRET = re.compile(r"key|token|secret|password|passwd|^pwd$|^sig|auth", re.IGNORECASE)
"""Parameters of an address that are nobody else's business."""


class RunConfig(BaseModel):
    """One run: what learns, on what, under which budgets.

    model          "nano" (shipped), "smollm2-135m" (`ramet models get`), a model directory, or hf:owner/name
    backend        what samples: transformers, vllm (an engine in this process), completions or chat (a server at `url`)
    url            of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; no place for a key, since it is written down
    budget         limits of every tree; `budget.generated` is drawn from `budgets` where these are given
    budgets        limits on generated tokens that training tasks are drawn with
    reward         what usage costs, in units of the score
    tell_budget    who is told in the prompt what may be spent: all branches, or only holders of the tool, where small models take the line
                   for part of the question. Methods are then compared fairly only with others that hold the tool
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "nano"
    backend: Literal["transformers", "vllm", "completions", "chat"] = "transformers"
    url: str = ""
    server: ServerConfig = ServerConfig()
    chat: Literal["auto", "nano", "chatml", "template"] = "auto"
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    env: EnvConfig = EnvConfig()
    attention: AttentionConfig = AttentionConfig()
    budget: Budget = Budget(answer_reserve=8, context=768, depth=1, width=16, turns=8)
    budgets: tuple[_Tokens, ...] = (64, 96, 128, 192, 256, 384)
    reward: Prices = Prices(generated=0.0003, critical_path=0.0006, failure=0.0)
    train: TrainConfig = TrainConfig(temperature=0.5, learning_rate=4e-4, decay=1.0, gradient_clip=0.2, kl=0.1, estimator="standardised")
    openrlhf: ClusterConfig = ClusterConfig()
    tell_budget: Literal["all", "holders"] = "all"
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _some_budget(self) -> RunConfig:
        for name in ("generated", "prefilled", "critical_path", "branch_generated", "turns", "context", "seconds"):
            if getattr(self.budget, name) == 0:
                raise ValueError(f"budget.{name} is 0: nothing could be answered; give it more or leave it out")
        if bool(self.url) != (self.backend in ("completions", "chat")):
            raise ValueError("url and a backend that is a server (completions, chat) go together")
        address = urlsplit(self.url)
        if address.username or address.password or any(_SECRET.search(name) for name, _ in parse_qsl(address.query)):
            raise ValueError("url holds a key or a user, and is written to the run folder; put the key into OPENAI_API_KEY")
        if self.attention.method != "dense" and self.backend != "transformers":
            raise ValueError(f"attention.method {self.attention.method} goes with the backend transformers")
        if self.attention.method != "dense" and self.device == "cuda":
            raise ValueError(f"attention.method {self.attention.method} runs on worker processes on the CPU: leave device out, or set cpu")
        if self.budget.generated is not None and self.budgets:
            raise ValueError("budget.generated and budgets both limit generated tokens; set budgets to [] to use the first")
        return self

    def identity(self) -> dict[str, Any]:
        """What tells runs apart: all settings but where a server is, and how many requests and how long it is waited for."""
        return self.model_dump(mode="json", exclude={"url": True, "server": {"in_flight", "seconds", "wait"}})


LANGUAGE: dict[str, Any] = {
    "model": "smollm2-135m",
    "budget": {"answer_reserve": 24, "context": "unlimited"},
    "env": {"kind": "hotpotqa"},
    "eval": {"tasks": 100, "budgets": [64, 128, 256, 512], "ood_budgets": [64, 128, 256, 512]},
}
"""What differs from the defaults for questions in words."""


def load(kind: type[_Config], path: Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> _Config:
    """Read `path` (without one, `defaults`), apply `key.sub=value` overrides in order, validate."""
    data: dict[str, Any] = copy.deepcopy(dict(defaults or {}))
    if path is not None:
        try:
            data = tomllib.loads(read_text(path))
        except OSError as error:
            raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(data, override)
    return validate(kind, data)


def validate(kind: type[_Config], data: dict[str, Any]) -> _Config:
    """`data` over the defaults, section by section: giving one key of a section leaves its others as they are."""
    try:
        return kind.model_validate(_merged(kind().model_dump(), data))
    except ValidationError as error:
        said = dict.fromkeys(_explain(kind, problem) for problem in error.errors(include_url=False))
        raise ConfigError("; ".join(list(said)[:3])) from None


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _apply(data: dict[str, Any], override: str) -> None:
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


def _explain(kind: type[BaseModel], problem: Any) -> str:
    where, schema = Settings(kind).at(problem["loc"])
    given = f" (got {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
    if problem["type"] == "value_error":
        return f"{where or 'config'}: {problem['msg'].removeprefix('Value error, ')}{given}"
    if problem["type"] != "extra_forbidden":
        example = kind().model_dump()
        for key in where.split("."):
            example = example.get(key, {}) if isinstance(example, dict) else None
        return f"{where or 'config'} takes {takes(schema, example)}{given}"
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
