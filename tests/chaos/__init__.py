"""Real processes, a real server, faults drawn from a seed; everything is judged from outside.

``python -m tests.chaos --help``, or ``make chaos SEED=1 DURATION=60``.
"""
