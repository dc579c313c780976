"""Why a quantizer wrote what it wrote: a block explained, two results compared, a kernel named.

`probing` makes an input that tells; `comparison` and `explanation` stand alone; `identification`
brings together `buffers` and `reading` (how bytes lie), `outer_reading`, `observed` (what a recipe
would have given), `decisions`, `inference` (the search) and `leftovers`. To let `identify` find one
thing more, see `decisions`, for buffers `buffers`.
"""

from nvfp4lab.diagnose.comparison import Comparison, compare
from nvfp4lab.diagnose.explanation import Explanation, explain_block
from nvfp4lab.diagnose.identification import Identification, identify
from nvfp4lab.diagnose.probing import probe

__all__ = [
    "Comparison",
    "Explanation",
    "Identification",
    "compare",
    "explain_block",
    "identify",
    "probe",
]
