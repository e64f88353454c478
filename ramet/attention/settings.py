"""The settings of sequence-parallel reading, without torch: those of `[attention]` in a run, of `ramet run`, and of the pool of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ramet.schema import Section

if TYPE_CHECKING:
    from ramet.attention.methods import Method


class AttentionConfig(Section):
    """How long contexts are read when a policy is measured: sequence-parallel on several worker processes of this machine."""

    method: Literal["dense", "spava", "apb", "star"] = "dense"
    """dense: by one process, exactly; others by the workers together."""
    hosts: Annotated[int, Field(ge=1)] = 2
    """Worker processes."""
    threshold: Annotated[int, Field(ge=0)] = 4096
    """Prompts of more tokens are read with the method, others exactly."""
    anchor: Annotated[int, Field(ge=0)] | None = None
    """Rows that every block sees; by default a share of the context."""
    passing: Annotated[int, Field(ge=0)] | None = None
    """Rows that a block passes on; by default a share of the context."""

    def build(self) -> Method:
        """The method with these lengths."""
        from ramet.attention.methods import Method

        return Method(self.method, self.anchor, self.passing)
