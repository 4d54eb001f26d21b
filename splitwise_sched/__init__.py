"""Redis-backed global scheduler for prefill/decode disaggregated LLM inference."""
