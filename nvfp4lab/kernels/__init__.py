"""Triton kernels. Imported when one is to run, by `nvfp4lab.staging` and by
`nvfp4lab.statistics.in_triton`, and by nothing else.

numerics.py   encoders and decoders as Triton functions
staging.py    ours: the staging kernel for `nvfp4` and `nvfp4-token`
seed.py       the user's kernel and launcher, kept as written
errors.py     what the error of a tensor is made of, counted and added up
counting.py   launches of errors.py
"""
