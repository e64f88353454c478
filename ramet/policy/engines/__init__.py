"""Engines that sample from the policy: transformers, vLLM, OpenAI-compatible servers, several workers."""
