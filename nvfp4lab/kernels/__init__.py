"""Triton kernels. Imported by `nvfp4lab.staging` and `benchmarks` when one is to run, else by none.

numerics.py   encoders and decoders as Triton functions
steps.py      the steps of staging, portable; packed.py: two BF16 numbers at a time, by PTX
staging.py    ours: the staging kernel of four recipes
seed.py       the user's kernel and launcher, kept as written
yardstick.py  the same bytes moved and nothing else, which the others are held against
"""
