"""KV blocks between GPU memories of one host: the destination maps the source's pool by IPC handle and copies."""
