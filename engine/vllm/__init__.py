"""KV transfer and scheduling for vLLM: a KV connector, and an instance that serves under this scheduler.

Nothing here is imported without vLLM but the pure parts: ``params``, ``regions`` and ``scheduler_side``.
"""
