"""KV transfer and scheduling for vLLM: a KV connector, an instance with vLLM in its process, and one beside a server.

What imports vLLM: ``connector``, ``metrics``, ``sampling`` and ``service``.
"""
