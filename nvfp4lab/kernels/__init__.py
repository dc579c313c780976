"""Triton kernels. Imported when one is to run, by `nvfp4lab.staging`, `nvfp4lab.quantized`,
`nvfp4lab.statistics.in_triton` and `nvfp4lab.benchmarks`, and by nothing else.

numerics.py   encoders and decoders as Triton functions
steps.py      what takes blocks to bytes, a number at a time
packed.py     the same two numbers at a time, as inline PTX for sm_90 and up
staging.py    ours: the staging kernel of four recipes, built of the steps
dequantize.py codes and scales to BF16, FP16 or float32
errors.py     what the error of a tensor is made of, counted and added up
counting.py   launches of errors.py
seed.py       the user's kernel and launcher, kept as written
yardstick.py  the same bytes moved and nothing else, which the others are held against
"""

import threading

# Held while a kernel is launched through Triton's JIT. Triton lets a second thread launch a kernel
# that the first is still loading, and its interpreter keeps the program's number in one place.
LAUNCHING = threading.RLock()
