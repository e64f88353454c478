"""All environments by kind: the settings classes in the modules of this folder, and those of other packages (`ramet.env.outside`)."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic_core import core_schema

import ramet.env
from ramet.env.outside import OutsideSettings, entries, origin, path_of
from ramet.env.settings import EnvSettings
from ramet.schema import NAMED

logger = logging.getLogger(__name__)
DEFAULT = "rows"
"""The kind of environment if none is named."""


def kinds_of(settings: type[EnvSettings]) -> tuple[str, ...]:
    """The kinds that a settings class stands for."""
    return get_args(settings.model_fields["kind"].annotation)


def _load_kinds() -> dict[str, type[EnvSettings]]:
    """The settings classes of this folder by kind."""
    here = [
        importlib.import_module(f"{ramet.env.__name__}.{module.name}")
        for module in pkgutil.iter_modules(ramet.env.__path__)
        if module.name != "registry"
    ]
    values = [(module, value) for module in here for value in vars(module).values()]
    classes = [value for module, value in values if _is_settings(value) and value.__module__ == module.__name__]
    return {kind: settings for settings in classes for kind in kinds_of(settings)}


def _is_settings(value: Any) -> bool:
    """Whether a value is the settings class of an environment with kinds of its own."""
    return isinstance(value, type) and issubclass(value, EnvSettings) and bool(kinds_of(value))


KINDS: Mapping[str, type[EnvSettings]] = _load_kinds()
"""The settings class of each kind that ramet brings."""


@cache
def _hides(kind: str) -> None:
    """Say, once, that an environment of another package has a name that ramet's own has."""
    if points := entries().get(kind):
        logger.warning(f"env.kind: {kind} is ramet's own; there is also {origin(points[0])}, which is called by that path")


def _validated(value: Any, handler: Callable[[Any], EnvSettings]) -> EnvSettings:
    """The settings of an environment of any package. Raises `ValueError` for an option that belongs only to other environments."""
    if isinstance(value, OutsideSettings) or not isinstance(value, Mapping):
        return value if isinstance(value, OutsideSettings) else handler(value)
    kind = value.get("kind")
    own = KINDS.get(kind) if isinstance(kind, str) else None
    if own is None:
        if not isinstance(kind, str) or not path_of(kind):
            return handler(value)
        for name in value.keys() - OutsideSettings.model_fields.keys():
            raise ValueError(f"{name} is no setting of ramet's; an option of {kind} is given as env.options.{name}")
        return OutsideSettings.model_validate(value)
    _hides(str(kind))
    for name in sorted(value.keys() - own.model_fields.keys()):
        if any(name in other.model_fields for other in KINDS.values()):
            takes = ", ".join(option for option in own.model_fields if option != "kind")
            raise ValueError(f"{name} does not belong to the environment {kind}, which takes {takes}")
    return handler(value)


class _Any:
    """How pydantic validates and writes the section."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        cases = {kind: handler.generate_schema(case) for kind, case in {**KINDS, NAMED: OutsideSettings}.items()}
        schema = core_schema.tagged_union_schema(cases, discriminator="kind")
        written = core_schema.plain_serializer_function_ser_schema(lambda env, info: env.model_dump(mode=info.mode), info_arg=True)
        return core_schema.no_info_wrap_validator_function(_validated, schema, serialization=written)


if TYPE_CHECKING:
    AnyEnv = EnvSettings
else:
    AnyEnv = Annotated[EnvSettings, _Any]
"""The section `[env]`: the settings of one environment, told apart by `kind`."""
_ADAPTER: TypeAdapter[EnvSettings] = TypeAdapter(AnyEnv)


def env_settings(kind: str = DEFAULT, **options: Any) -> EnvSettings:
    """The settings of an environment by its kind. Raises pydantic's `ValidationError` for a wrong option."""
    return _ADAPTER.validate_python({"kind": kind, **options})
