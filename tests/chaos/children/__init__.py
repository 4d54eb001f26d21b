"""The processes of a run, each on asyncio, each talking to the harness over a channel."""
