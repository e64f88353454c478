"""ramet: a language model that learns to delegate to clones of itself under one budget.

What a user needs is found here by name, such as `ramet.Runtime`, and imported when it is first asked for: `import ramet` imports no
torch, and neither do the names that need none.
"""

from __future__ import annotations

import dis
import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ramet.version import __version__

# Silent, until whoever uses the package, such as its command line, says where its log goes.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    # One line a name. `_exported` reads them, so that type checkers and `__getattr__` have one list.
    from ramet.agents.budget import Budget as Budget
    from ramet.agents.chat import ChatFormat as ChatFormat
    from ramet.agents.chat import ChatMLFormat as ChatMLFormat
    from ramet.agents.chat import chat_format as chat_format
    from ramet.agents.events import BranchEnded as BranchEnded
    from ramet.agents.events import BranchStarted as BranchStarted
    from ramet.agents.events import CallEnded as CallEnded
    from ramet.agents.events import CallMade as CallMade
    from ramet.agents.events import TokensSampled as TokensSampled
    from ramet.agents.events import TreeEnded as TreeEnded
    from ramet.agents.events import TurnSampled as TurnSampled
    from ramet.agents.growth import Role as Role
    from ramet.agents.program import ProgramBranch as ProgramBranch
    from ramet.agents.protocol import CloneResult as CloneResult
    from ramet.agents.protocol import Objective as Objective
    from ramet.agents.runtime import Runtime as Runtime
    from ramet.agents.sampling import Middleware as Middleware
    from ramet.agents.sampling import Policy as Policy
    from ramet.agents.sampling import Sampling as Sampling
    from ramet.agents.templates import TemplateFormat as TemplateFormat
    from ramet.agents.tools import BranchView as BranchView
    from ramet.agents.tools import Tool as Tool
    from ramet.agents.tools import budget as budget
    from ramet.agents.tools import read as read
    from ramet.agents.tools import tool as tool
    from ramet.agents.transcripts import Transcript as Transcript
    from ramet.agents.transcripts import Transcripts as Transcripts
    from ramet.agents.transcripts import read_transcripts as read_transcripts
    from ramet.agents.tree import Branch as Branch
    from ramet.agents.tree import Message as Message
    from ramet.agents.tree import Segment as Segment
    from ramet.agents.tree import Status as Status
    from ramet.agents.tree import Task as Task
    from ramet.agents.tree import ToolResult as ToolResult
    from ramet.agents.tree import Tree as Tree
    from ramet.agents.tree import Turn as Turn
    from ramet.agents.tree import Usage as Usage
    from ramet.env.check import check_environment as check_environment
    from ramet.env.environment import Environment as Environment
    from ramet.env.settings import EnvSettings as EnvSettings
    from ramet.env.simple import SimpleEnvironment as SimpleEnvironment
    from ramet.errors import AnswerError as AnswerError
    from ramet.errors import BudgetExhausted as BudgetExhausted
    from ramet.errors import ChatFormatError as ChatFormatError
    from ramet.errors import CheckpointError as CheckpointError
    from ramet.errors import ConfigError as ConfigError
    from ramet.errors import PolicyError as PolicyError
    from ramet.errors import ProgramError as ProgramError
    from ramet.errors import RametError as RametError
    from ramet.errors import RefusedRequest as RefusedRequest
    from ramet.errors import RewardError as RewardError
    from ramet.errors import StorageError as StorageError
    from ramet.errors import TaskError as TaskError
    from ramet.errors import TransientPolicyError as TransientPolicyError
    from ramet.policy.engines.hf import HFPolicy as HFPolicy
    from ramet.policy.engines.openai import ChatPolicy as ChatPolicy
    from ramet.policy.engines.openai import CompletionsPolicy as CompletionsPolicy
    from ramet.policy.engines.openai import ResponsesPolicy as ResponsesPolicy
    from ramet.policy.engines.openai import WireFormat as WireFormat
    from ramet.policy.engines.vllm import VLLMPolicy as VLLMPolicy
    from ramet.policy.models.load import load_model as load_model
    from ramet.policy.models.tokenizer import load_tokenizer as load_tokenizer
    from ramet.policy.training.reward import Reward as Reward
    from ramet.policy.training.reward import RewardFunction as RewardFunction
    from ramet.policy.training.trainer import Learner as Learner
    from ramet.policy.training.trainer import Trainer as Trainer
    from ramet.policy.training.update import LearningProblem as LearningProblem
    from ramet.policy.training.update import TaskSampler as TaskSampler
    from ramet.policy.training.update import TrainConfig as TrainConfig
    from ramet.runs.agent import Agent as Agent
    from ramet.tools.calculator import calculator as calculator
    from ramet.tools.mcp import mcp_tools as mcp_tools
    from ramet.tools.python import python_tool as python_tool
    from ramet.tools.search import search as search
    from ramet.tools.search import search_tool as search_tool


def _exported() -> dict[str, str]:
    """The module of each name that is imported above, from this module's code, which an install without sources has too."""
    assert __spec__ is not None
    modules, module = {}, ""
    for step in dis.get_instructions(__spec__.loader.get_code(__name__)):  # type: ignore[union-attr]
        if step.opname == "IMPORT_NAME":
            module = step.argval
        elif step.opname == "IMPORT_FROM" and step.argval not in globals():
            modules[step.argval] = module
    return modules


_EXPORTS = _exported()
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_EXPORTS[name])
    except ModuleNotFoundError as error:
        from ramet.errors import missing_extra

        if not (missing := missing_extra(error)):
            raise
        raise ModuleNotFoundError(f"ramet.{name}: {missing}", name=error.name) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
