"""Sweeps: any number of recipes over any number of captured shards, in any number of processes.

`shards` finds the files of each site, `tasks` is what a worker does, `workers` runs tasks on an
executor and gives each worker its GPU, `state` is what a killed sweep leaves behind, `sweeping`
brings them together. To sweep with other executors nothing is to be changed: any
concurrent.futures.Executor does.
"""

from nvfp4lab.sweeps.sweeping import Swept as Swept
from nvfp4lab.sweeps.sweeping import sweep as sweep
from nvfp4lab.sweeps.sweeping import sweep_statistics as sweep_statistics
from nvfp4lab.sweeps.workers import processes as processes
