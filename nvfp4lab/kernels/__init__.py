"""Triton kernels. Imported by `nvfp4lab.staging` and `benchmarks` when one is to run, else by none.

numerics.py   encoders and decoders as Triton functions
staging.py    ours: the staging kernel for `nvfp4` and `nvfp4-token`
seed.py       the user's kernel and launcher, kept as written
yardstick.py  the same bytes moved and nothing else, which the others are held against
"""
