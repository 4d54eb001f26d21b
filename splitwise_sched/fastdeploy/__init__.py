"""FastDeploy's scheduler interface on this scheduler: an engine loop written for that one runs on this one.

See docs/fastdeploy.md for what is the same, what differs, and which options have an effect.
"""

from splitwise_sched.fastdeploy.config import SplitWiseSchedulerConfig
from splitwise_sched.fastdeploy.objects import CompletionOutput, Request, RequestOutput
from splitwise_sched.fastdeploy.scheduler import SplitWiseScheduler

__all__ = ["CompletionOutput", "Request", "RequestOutput", "SplitWiseScheduler", "SplitWiseSchedulerConfig"]
