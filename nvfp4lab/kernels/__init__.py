"""Triton kernels. Imported by `nvfp4lab.staging` and `nvfp4lab.quantized` when one is to run.

numerics.py   encoders and decoders as Triton functions
staging.py    ours: the staging kernel for `nvfp4` and `nvfp4-token`
dequantize.py codes and scales to BF16, FP16 or float32
seed.py       the user's kernel and launcher, kept as written
"""
