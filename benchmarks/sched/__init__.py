"""Parts of benchmarks/scheduler.py: child processes, zero-work instances, loads, and what Redis tells."""
