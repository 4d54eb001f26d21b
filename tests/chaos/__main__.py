"""``python -m tests.chaos``: one run, its table, and its result as the exit status."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import click

from tests.chaos.plan import PLANS
from tests.chaos.rigs import KINDS, RigMissing
from tests.chaos.run import run
from tests.chaos.spec import RunSpec

# A failover may be slow on a slow machine; a request that is too late for it is not what is looked for.
SLOW_TO_RECOVER, SLOW_TIMEOUT_S = ("sentinel", "cluster"), 90.0


@click.command()
@click.option("--seed", default=1, show_default=True, help="Draws the plan.")
@click.option("--duration", default=60.0, show_default=True, help="Seconds of load and faults.")
@click.option("--plan", type=click.Choice(sorted(PLANS)), default="mixed", show_default=True)
@click.option("--server", type=click.Choice(KINDS), default="redis", show_default=True)
@click.option("--rate", default=200.0, show_default=True, help="Requests a second.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there.")
@click.option("--verbose", is_flag=True, help="Tell of every fault.")
def main(  # noqa: PLR0917
    seed: int, duration: float, plan: str, server: str, rate: float, json_path: Path | None, verbose: bool
) -> None:
    """Load and faults drawn from a seed on real processes and a real server; every stream is checked."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")
    timeout_s = SLOW_TIMEOUT_S if server in SLOW_TO_RECOVER else RunSpec.timeout_s
    spec = RunSpec(seed=seed, duration_s=duration, plan=plan, server=server, rate=rate, timeout_s=timeout_s)
    try:
        result = asyncio.run(run(spec))
    except RigMissing as exc:
        raise click.ClickException(str(exc)) from exc
    print(result.table())
    if json_path is not None:
        json_path.write_text(json.dumps(result.to_json(), indent=1))
    sys.exit(1 if result.problems else 0)


if __name__ == "__main__":
    main()
