"""Why a quantizer wrote what it wrote: a block explained, two results compared, a kernel named."""

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
