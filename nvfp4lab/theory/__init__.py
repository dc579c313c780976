"""What error to expect: a recipe on a law of elements, by quadrature; no sampling.

`expectation` is the way in. `laws`: what elements are drawn from. `steps`: a recipe in real
arithmetic. `integrals` and `plain`: a block by its largest magnitude; `four_over_six`: a block with
two candidates; `outer_scales`: the mean over what the largest of all elements may be. `prediction`:
the theory held against measured activations. A new kind of blocks is a class with `between` and
`at`, chosen in `expectation.blocks_of`.
"""

from nvfp4lab.theory.expectation import Expectation as Expectation
from nvfp4lab.theory.expectation import expected_error as expected_error
from nvfp4lab.theory.prediction import Prediction as Prediction
from nvfp4lab.theory.prediction import predict as predict
from nvfp4lab.theory.steps import NoTheory as NoTheory
