"""OpenAI-compatible servers as policies.

`CompletionsPolicy` speaks token ids with servers that take and return them (vLLM, SGLang-type): what is sampled is what is
recorded. `ChatPolicy` speaks messages with any chat server; its ids are made here (`WireFormat`), so its trees can be priced,
compared and resumed, but not trained (`trainable`).

Both stream, so that a request that is cancelled or cut off is charged what had come. An answer is complete at its finish reason
or at `[DONE]`, whichever comes first. What may pass raises `TransientPolicyError`, with the server's Retry-After; what does not
fit this one prompt raises `RefusedRequest`; everything else that fails is final. The API key is read from an environment
variable and stands in no message, log or journal.
"""

from ramet.policy.engines.openai.chat import ChatPolicy
from ramet.policy.engines.openai.completions import CompletionsPolicy
from ramet.policy.engines.openai.faults import retry_after
from ramet.policy.engines.openai.wire import WireFormat

__all__ = ["ChatPolicy", "CompletionsPolicy", "WireFormat", "retry_after"]
