"""All environments by kind: the settings classes of the modules of this folder, and those that other packages bring.

Another package brings one by an entry point of the group `ramet.environments` that names its subclass of `EnvSettings`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import reduce
from importlib.metadata import entry_points
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic_core import to_jsonable_python

import ramet.env
from ramet.env.settings import EnvSettings
from ramet.errors import ConfigError, first_line

DEFAULT = "rows"
GROUP = "ramet.environments"


def kinds_of(settings: type[EnvSettings]) -> tuple[str, ...]:
    """The kinds that a class stands for."""
    return get_args(settings.model_fields["kind"].annotation)


def _found() -> dict[str, type[EnvSettings]]:
    """Raises `ConfigError` for an entry point that is no settings class, and for a kind that there is already."""
    here = [
        importlib.import_module(f"{ramet.env.__name__}.{module.name}")
        for module in pkgutil.iter_modules(ramet.env.__path__)
        if module.name != "registry"
    ]
    classes = [found for module in here for found in vars(module).values() if _settings(found) and found.__module__ == module.__name__]
    known = {kind: found for found in classes for kind in kinds_of(found)}
    for point in entry_points(group=GROUP):
        try:
            brought = point.load()
        except Exception as error:  # whatever the code of another package raises
            raise ConfigError(f"the environment {point.name} cannot be imported from {point.value}: {first_line(error)}") from error
        if not _settings(brought):
            raise ConfigError(f"the environment {point.name}: {point.value} is no subclass of EnvSettings whose kind is a literal")
        taken = [kind for kind in kinds_of(brought) if known.get(kind, brought) is not brought]
        if taken:
            raise ConfigError(f"the environment {point.name}: there is an environment {taken[0]} already; {point.value} needs another kind")
        known |= dict.fromkeys(kinds_of(brought), brought)
    return known


def _settings(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, EnvSettings) and bool(kinds_of(found))


KINDS: Mapping[str, type[EnvSettings]] = _found()
"""The settings class of each kind."""


def _own(given: Any) -> Any:
    """With a kind, and without options of other environments that hold their defaults, as run folders from before the split do."""
    if not isinstance(given, Mapping):
        return given
    kind = given.get("kind", DEFAULT)
    own = KINDS.get(kind) if isinstance(kind, str) else None
    if own is None:
        return given
    for name in given.keys() - own.model_fields.keys():
        theirs = [other.model_fields[name].default for other in KINDS.values() if name in other.model_fields]
        if theirs and to_jsonable_python(given[name], fallback=repr) not in to_jsonable_python(theirs):
            takes = ", ".join(option for option in own.model_fields if option != "kind")
            raise ValueError(f"{name} does not belong to the environment {kind}, which takes {takes}")
        if theirs:
            given = {key: value for key, value in given.items() if key != name}
    return {"kind": kind, **given}


if TYPE_CHECKING:
    AnyEnv = EnvSettings
else:
    AnyEnv = Annotated[reduce(or_, dict.fromkeys(KINDS.values())), Field(discriminator="kind"), BeforeValidator(_own)]
"""The section `[env]`: the settings of one environment, told apart by `kind`."""
_ADAPTER: TypeAdapter[EnvSettings] = TypeAdapter(AnyEnv)


def env_settings(kind: str = DEFAULT, **options: Any) -> EnvSettings:
    """The settings of an environment by its kind."""
    return _ADAPTER.validate_python({"kind": kind, **options})
