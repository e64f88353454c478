"""The supported release of OpenRLHF. Its internal classes change between releases, so any other release is refused."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ramet.errors import ConfigError

OPENRLHF = "0.11.2"
"""The supported release."""


def check() -> None:
    """Raises `ConfigError` if OpenRLHF is not installed or is another release."""
    try:
        installed = version("openrlhf")
    except PackageNotFoundError:
        raise ConfigError(f"OpenRLHF is not installed: pip install 'ramet[openrlhf]', which takes openrlhf=={OPENRLHF}") from None
    if installed != OPENRLHF:
        raise ConfigError(
            f"openrlhf {installed} is not supported: ramet replaces classes of openrlhf {OPENRLHF}; "
            f"pip install --no-deps openrlhf=={OPENRLHF}"
        )
