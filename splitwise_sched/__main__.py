"""``python -m splitwise_sched`` is ``splitwise-sched``."""

import sys

from splitwise_sched.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
