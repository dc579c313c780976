"""Triton kernels. Imported by `nvfp4lab.staging` when one is to run, and by nothing else.

numerics.py   encoders and decoders as Triton functions
staging.py    ours: the staging kernel for `nvfp4` and `nvfp4-token`
seed.py       the user's kernel and launcher, kept as written
"""
