"""Statistics: the measured error of a recipe on any number of tensors, and how two add up.

`contents` says what is held, `measures` what is derived from it, `merging` adds, compares and
saves, `bins` has the histograms' fixed bins. `tally` fills it from pieces of a tensor, which
`in_torch` counts anywhere and `in_triton` by a kernel on a GPU. `concentration` is of any terms.
Where a measure is added, `contents` and `measures` say.
"""

from nvfp4lab.statistics.concentration import effective_count as effective_count
from nvfp4lab.statistics.concentration import top_share as top_share
from nvfp4lab.statistics.contents import digest as digest
from nvfp4lab.statistics.merging import Statistics as Statistics
from nvfp4lab.statistics.tally import Tally as Tally
