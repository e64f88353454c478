"""All environments by kind: the settings classes in the modules of this folder, and those that other packages add.

Another package adds an environment by an entry point in the group `ramet.environments` that names its subclass of `EnvSettings`.
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

import ramet.env
from ramet.env.settings import EnvSettings
from ramet.errors import ConfigError, first_line

DEFAULT = "rows"
"""The kind of environment if none is named."""
GROUP = "ramet.environments"
"""The group of entry points for environments of other packages."""


def kinds_of(settings: type[EnvSettings]) -> tuple[str, ...]:
    """The kinds that a settings class stands for."""
    return get_args(settings.model_fields["kind"].annotation)


def _load_kinds() -> dict[str, type[EnvSettings]]:
    """All settings classes by kind. Raises `ConfigError` for an entry point that is not one, and for a kind that is taken already."""
    here = [
        importlib.import_module(f"{ramet.env.__name__}.{module.name}")
        for module in pkgutil.iter_modules(ramet.env.__path__)
        if module.name != "registry"
    ]
    values = [(module, value) for module in here for value in vars(module).values()]
    classes = [value for module, value in values if _is_settings(value) and value.__module__ == module.__name__]
    known = {kind: settings for settings in classes for kind in kinds_of(settings)}
    for point in entry_points(group=GROUP):
        try:
            settings = point.load()
        except Exception as error:  # whatever the code of another package raises
            raise ConfigError(f"the environment {point.name} cannot be imported from {point.value}: {first_line(error)}") from error
        if not _is_settings(settings):
            raise ConfigError(f"the environment {point.name}: {point.value} is not a subclass of EnvSettings whose kind is a literal")
        taken = [kind for kind in kinds_of(settings) if known.get(kind, settings) is not settings]
        if taken:
            raise ConfigError(f"the environment {point.name}: there is an environment {taken[0]} already; {point.value} needs another kind")
        known |= dict.fromkeys(kinds_of(settings), settings)
    return known


def _is_settings(value: Any) -> bool:
    """Whether a value is the settings class of an environment."""
    return isinstance(value, type) and issubclass(value, EnvSettings) and bool(kinds_of(value))


KINDS: Mapping[str, type[EnvSettings]] = _load_kinds()
"""The settings class of each kind."""


def _own_options(options: Any) -> Any:
    """The options, unchanged. Raises `ValueError` if one of them belongs only to other environments."""
    if not isinstance(options, Mapping):
        return options
    kind = options.get("kind")
    own = KINDS.get(kind) if isinstance(kind, str) else None
    if own is None:
        return options
    for name in sorted(options.keys() - own.model_fields.keys()):
        if any(name in other.model_fields for other in KINDS.values()):
            takes = ", ".join(option for option in own.model_fields if option != "kind")
            raise ValueError(f"{name} does not belong to the environment {kind}, which takes {takes}")
    return options


if TYPE_CHECKING:
    AnyEnv = EnvSettings
else:
    AnyEnv = Annotated[reduce(or_, dict.fromkeys(KINDS.values())), Field(discriminator="kind"), BeforeValidator(_own_options)]
"""The section `[env]`: the settings of one environment, told apart by `kind`."""
_ADAPTER: TypeAdapter[EnvSettings] = TypeAdapter(AnyEnv)


def env_settings(kind: str = DEFAULT, **options: Any) -> EnvSettings:
    """The settings of an environment by its kind. Raises pydantic's `ValidationError` for a wrong option."""
    return _ADAPTER.validate_python({"kind": kind, **options})
