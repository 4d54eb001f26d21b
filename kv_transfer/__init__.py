"""Moves KV-cache blocks between the pools of two engine ranks. Knows nothing of Redis or of any engine."""
