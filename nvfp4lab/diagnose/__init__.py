"""Why a quantizer wrote what it wrote: `explain_block` for one block, `compare` for two results."""

from nvfp4lab.diagnose.comparison import Comparison, compare
from nvfp4lab.diagnose.explanation import Explanation, explain_block

__all__ = ["Comparison", "Explanation", "compare", "explain_block"]
