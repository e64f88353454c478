"""The release of OpenRLHF that this is written for. Its inner classes change from release to release; another is refused by name."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ramet.errors import ConfigError

OPENRLHF = "0.11.2"


def check() -> None:
    """Raises `ConfigError` if OpenRLHF is missing or of another release."""
    try:
        found = version("openrlhf")
    except PackageNotFoundError:
        raise ConfigError(f"OpenRLHF is not installed: pip install 'ramet[openrlhf]', which takes openrlhf=={OPENRLHF}") from None
    if found != OPENRLHF:
        raise ConfigError(
            f"openrlhf {found} is not supported: ramet stands in for classes of openrlhf {OPENRLHF}; "
            f"pip install --no-deps openrlhf=={OPENRLHF}"
        )
