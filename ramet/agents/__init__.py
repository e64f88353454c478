"""The agent runtime: branches that spawn clones, their budgets, the protocol between them and the record of it all. Torch-free."""

from ramet.agents.budget import Budget, Ledger
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, Policy, Sample, SampleRequest, Sampling
from ramet.agents.tree import Branch, Message, Status, StopReason, Task, Tree, Turn, Usage

__all__ = [
    "Branch",
    "Budget",
    "Job",
    "Ledger",
    "Message",
    "Partial",
    "Policy",
    "Runtime",
    "Sample",
    "SampleRequest",
    "Sampling",
    "Status",
    "StopReason",
    "Task",
    "Tree",
    "Turn",
    "Usage",
]
