"""Jobs: work in processes and folders of its own, several at once, which survives interruptions.

`trl-ext demo`, `trl-ext compare` and the probes that train are lists of jobs. A job that has finished is not run again,
one that was interrupted is started again in its folder, and whoever starts jobs takes them along when it ends, however
it ends.
"""

from trl_ext.jobs.costs import COSTS, Costs, read_costs
from trl_ext.jobs.job import SAID, Job, Outcome
from trl_ext.jobs.pool import Pool
from trl_ext.jobs.ties import TIED, tie_where_asked

__all__ = ["COSTS", "SAID", "TIED", "Costs", "Job", "Outcome", "Pool", "read_costs", "tie_where_asked"]
