"""Environments of other packages: found by the name of an entry point or by import path, made from options, and checked in use.

An entry point in the group `ramet.environments`, or an import path, names an environment, or whatever makes one when it is called
with options: a class or a function, whose signature says which options there are, or a subclass of `EnvSettings`. None of it is
trusted: what it raises, or returns in a wrong form, is one line that names it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model, model_validator

from ramet.agents.protocol import explain
from ramet.agents.tree import Message, Segment, Task
from ramet.env.environment import Environment
from ramet.env.questions import Questions
from ramet.env.settings import EnvSettings, hashes, words
from ramet.errors import ConfigError, RametError, TaskError, first_line
from ramet.imports import load_object
from ramet.policy.training.reward import RewardFunction, to_reward
from ramet.schema import NAMED

GROUP = "ramet.environments"
"""The group of entry points for environments of other packages."""
_Options = TypeVar("_Options", bound=BaseModel)
REQUIRED = ("name", "splits", "metrics", "tasks", "grade", "canonical", "size")


def entries() -> dict[str, list[EntryPoint]]:
    """The entry points for environments by name, the same one only once."""
    by_name: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        if point.value not in [other.value for other in by_name.get(point.name, [])]:
            by_name.setdefault(point.name, []).append(point)
    return by_name


def origin(point: EntryPoint) -> str:
    """What an entry point names, and the distribution that has it."""
    return f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def path_of(kind: str) -> str:
    """The import path of an environment by that path itself or by the name of an entry point; "" if there is none of that name.

    Raises `ConfigError` if two packages have one of that name.
    """
    if ":" in kind:
        return kind
    points = entries().get(kind, [])
    if len(points) > 1:
        both = " and ".join(origin(point) for point in points[:2])
        raise ConfigError(f"env.kind: there are two environments called {kind}: {both}; give one as {points[0].value}")
    return f"{points[0].module}:{points[0].attr}" if points else ""


class OutsideSettings(EnvSettings):
    """An environment of another package."""

    kind: Annotated[str, Field(json_schema_extra={"const": NAMED})]
    """The name of an entry point for environments, or an import path."""
    options: dict[str, Any] = Field(default={})
    """Options of the environment, which checks them itself."""

    @model_validator(mode="after")
    def _made_of_its_options(self) -> Self:
        self._settings()
        return self

    def _settings(self) -> EnvSettings | BaseModel | None:
        """The options as the environment's own settings, or as the arguments of what makes it; None for one that takes none.

        Raises `ConfigError` for what cannot be imported, is no environment, or does not take these options.
        """
        target = self._target()
        if isinstance(target, type) and issubclass(target, EnvSettings):
            return self._validated(target)
        if isinstance(target, type):
            check_members(target, self.kind, ("tasks", "grade"))
        elif hasattr(target, "tasks"):
            if self.options:
                raise ConfigError(f"env.options: {self.kind} is an environment as it stands, which takes no options")
            return None
        elif not callable(target):
            raise ConfigError(f"env.kind: {self.kind} is of type {type(target).__name__}, neither an environment nor what makes one")
        return self._validated(_parameters(target, self.kind))

    def _target(self) -> Any:
        return load_object(path_of(self.kind), "env.kind")

    def _validated(self, model: type[_Options]) -> _Options:
        try:
            return model.model_validate(self.options)
        except ValidationError as error:
            takes = ", ".join(_names(model)) or "none"
            raise ConfigError(f"env.options of {self.kind}: {explain(error)}; it takes {takes}") from None

    @property
    def _own(self) -> EnvSettings | None:
        settings = self._settings()
        return settings if isinstance(settings, EnvSettings) else None

    def build(self, count: Callable[[str], int] = words) -> Environment:
        """The environment, checked in use. Raises `ConfigError` for one that cannot be made or lacks a method."""
        settings, target = self._settings(), self._target()
        try:
            if isinstance(settings, EnvSettings):
                env: Any = settings.build(count)
            elif settings is None:
                env = target
            else:
                fields = type(settings).model_fields
                env = target(**{str(fields[name].alias): getattr(settings, name) for name in settings.model_fields_set})
        except RametError as error:
            raise ConfigError(f"env.kind: {self.kind} cannot be made: {error}") from error
        except (Exception, SystemExit) as error:  # anybody's code
            raise ConfigError(f"env.kind: {self.kind} cannot be made: {type(error).__name__}: {first_line(error)}") from error
        check_members(env, self.kind)
        checks_itself = isinstance(env, Questions)
        return env if checks_itself else Outside(env, self.kind)

    def instruction(self, spawn: bool) -> str:
        """The environment's own instruction where it has one, else that of questions in words, with documents or without."""
        if self._own is not None:
            return self._own.instruction(spawn)
        given = getattr(self.build(), "instruction", None)
        return super().instruction(spawn) if given is None else str(given)

    @property
    def language(self) -> bool:
        """Whether an instruction on how to answer stands at the end of questions."""
        return self._own.language if self._own is not None else bool(self.instruction(True))

    @property
    def metric(self) -> str:
        """The name of the score."""
        return self.build().metrics[0]

    @property
    def measurable(self) -> bool:
        """Whether there are tasks to measure on."""
        return self._own.measurable if self._own is not None else bool(self.build().splits)

    @property
    def code(self) -> tuple[str, ...]:
        """The import path of the environment."""
        return (path_of(self.kind),)

    def files(self) -> dict[str, str]:
        """The SHA-256 of files that options name, and the fingerprint of an environment that has one."""
        if self._own is not None:
            return self._own.files()
        named = {name: Path(value) for name, value in self.options.items() if isinstance(value, str)}
        fingerprint = getattr(self.build(), "fingerprint", None)
        return hashes(named) | ({"tasks": str(fingerprint())} if callable(fingerprint) else {})

    def video_settings(self) -> Any:
        """How a vision-language model samples videos."""
        return super().video_settings() if self._own is None else self._own.video_settings()

    def absolute(self) -> Self:
        """A copy in whose options the names of files are absolute."""
        options = {
            name: str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value
            for name, value in self.options.items()
        }
        return self.model_copy(update={"options": options})


def check_members(env: Any, kind: str, required: Sequence[str] = REQUIRED) -> None:
    """Raises `ConfigError` for an environment, or its class, that lacks some of its members."""
    # The grade that `Environment` has calls the reward.
    graded = getattr(env, "grade", None) is not None and hasattr(env, "reward")
    graded = graded or getattr(env if isinstance(env, type) else type(env), "grade", None) is not Environment.grade
    lacks = [name for name in required if not hasattr(env, name) or (name == "grade" and not graded)]
    if lacks:
        what = f"the class {env.__name__}" if isinstance(env, type) else f"of type {type(env).__name__}"
        raise ConfigError(f"env.kind: {kind} is {what}, without {' and '.join(lacks)}; ramet.Environment has all but tasks and grade")


def _names(model: type[BaseModel]) -> list[str]:
    return [f.alias or name for name, f in model.model_fields.items() if name != "kind"]


def _parameters(target: Any, kind: str) -> type[BaseModel]:
    """A model of the parameters of a class or function; those without an annotation take anything."""
    try:
        signature = inspect.signature(target)
        hints = typing.get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target)  # noqa: B009
        fields: dict[str, Any] = {}
        for number, parameter in enumerate(signature.parameters.values()):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[f"option_{number}"] = (hints.get(parameter.name, Any), Field(default, alias=parameter.name))
        return create_model("options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    except (TypeError, ValueError, NameError, PydanticUserError) as error:
        raise ConfigError(f"env.kind: {kind} says not which options it takes: {first_line(error)}") from None


@dataclass(frozen=True)
class Outside:
    """An environment of another package, each of whose answers is checked.

    Raises `TaskError` for tasks and `RewardError` for grades that are wrong, in one line that names the environment; errors of ramet's
    own that it raises pass.
    """

    env: Any
    kind: str

    @property
    def name(self) -> str:
        """The name in results."""
        return str(self.env.name)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the splits "iid" and "ood" that there are tasks for."""
        splits = tuple(self.env.splits)
        if strange := [split for split in splits if split not in ("iid", "ood")]:
            raise ConfigError(f"env.kind: {self.kind} has the split {strange[0]!r}; splits are iid and ood")
        return splits

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics by which an answer can be graded."""
        metrics = self.env.metrics
        if isinstance(metrics, str) or not metrics or not all(isinstance(name, str) for name in metrics):
            raise ConfigError(f"env.kind: the metrics of {self.kind} are {metrics!r}, not a list of names")
        return tuple(metrics)

    @property
    def instruction(self) -> str | None:
        """What stands at the end of each question; None for the usual."""
        return getattr(self.env, "instruction", None)

    @property
    def reward(self) -> RewardFunction | None:
        """How it grades whole trees; None if it grades answers."""
        return getattr(self.env, "reward", None)

    @property
    def fingerprint(self) -> Callable[[], str] | None:
        """Tells its tasks from others, where it has such a method."""
        return getattr(self.env, "fingerprint", None)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split; if there are fewer to measure on, those."""
        call = f"tasks({split!r}, {count}, {seed})"
        try:
            tasks = list(self.env.tasks(split, count, seed))
        except RametError:
            raise
        except (Exception, SystemExit) as error:
            self._failed(error, call)
        wrong = next((task for task in tasks if not isinstance(task, Task)), None)
        if wrong is not None:
            raise TaskError(f"the environment {self.kind} gives a {type(wrong).__name__}, not a Task, for {call}")
        if len(tasks) > count or (len(tasks) < count and (split == "train" or not tasks)):
            raise TaskError(f"the environment {self.kind} gives {len(tasks)} tasks for {call}")
        for task in tasks:
            if problem := problem_of(task):
                raise TaskError(f"the environment {self.kind} gives a task {task.id!r} {problem}")
        ids = [task.id for task in tasks]
        if split != "train" and len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise TaskError(f"the environment {self.kind} gives two tasks of the split {split} the id {twice!r}; results are kept by it")
        return tasks

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """The score of an answer."""
        try:
            grade = self.env.grade(task, answer) if metric is None else self.env.grade(task, answer, metric)
        except RametError:
            raise
        except (Exception, SystemExit) as error:
            self._failed(error, f"grade of task {task.id}")
        return to_reward(grade, task).score

    def canonical(self, answer: str) -> str:
        """A form that is equal for equivalent answers."""
        try:
            return str(self.env.canonical(answer))
        except (Exception, SystemExit) as error:
            self._failed(error, f"canonical({answer[:40]!r})")

    def size(self, task: Task) -> int:
        """The difficulty of a task."""
        try:
            return int(self.env.size(task))
        except (Exception, SystemExit) as error:
            self._failed(error, f"size of task {task.id}")

    def _failed(self, error: BaseException, what: str) -> NoReturn:
        raise TaskError(f"the environment {self.kind} raised {type(error).__name__} in {what}: {first_line(error)}") from error


def problem_of(task: Task) -> str:
    """What is wrong with a task, to stand after its name; "" if nothing is."""
    if not isinstance(task.id, str) or not task.id:
        return "whose id is no text"
    if not isinstance(task.messages, tuple | list) or not task.messages or not all(isinstance(m, Message) for m in task.messages):
        return "whose messages are not a list of Message; make tasks with Task.ask"
    if not isinstance(task.documents, Mapping) or not all(isinstance(key, str) for key in task.documents):
        return "whose documents are not a dict by key"
    if not all(isinstance(document, str | Segment) for document in task.documents.values()):
        return "with a document that is neither text nor a part of a video"
    texts = [message.content for message in task.messages] + [text for text in task.documents.values() if isinstance(text, str)]
    try:
        "".join(texts + list(task.documents)).encode()
    except UnicodeEncodeError as error:
        return f"with {error.object[error.start]!r}, which is no character of a text"
    return ""
