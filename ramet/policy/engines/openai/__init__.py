"""OpenAI-compatible servers as policies.

`CompletionsPolicy` exchanges token ids with servers that accept and return them (such as vLLM and SGLang): the recorded ids are those
that were sampled. `ChatPolicy` exchanges messages with any chat server, `ResponsesPolicy` with any that has the Responses endpoint; they
invent ids for them (`WireFormat`), so their trees can be priced, compared and resumed, but not trained on (`trainable`).

All stream, so that a request that is cancelled or cut off is charged for what had arrived. An answer is complete at its finish
reason or at `[DONE]`, whichever comes first. Failures that may pass raise `TransientPolicyError`, with the server's Retry-After; a
prompt that the server refuses raises `RefusedRequest`; all other failures are final. The API key is read from an environment
variable and never appears in a message, log or journal.
"""

from ramet.policy.engines.openai.chat import ChatPolicy
from ramet.policy.engines.openai.completions import CompletionsPolicy
from ramet.policy.engines.openai.faults import retry_after
from ramet.policy.engines.openai.responses import ResponsesPolicy
from ramet.policy.engines.openai.wire import WireFormat

__all__ = ["ChatPolicy", "CompletionsPolicy", "ResponsesPolicy", "WireFormat", "retry_after"]
