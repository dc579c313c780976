"""The recipes that have a name: ours, those of the published formats, and what each peer does.

Each entry says what sets it apart, where it was read (project, version, file) and just the
decisions in which it differs from `nvfp4`. To add a recipe, add it to `_RECIPES` and a row to the
README's table (a test compares them); one that is named after a peer gets an adapter in
tests/conformance/peers.py. Recipes named after a peer are held against the
installed peer by `make conformance`, whose outcome is data/conformance.json; where `source` says
"by source only", the peer does not install on a CPU: examples are worked by hand, and what the
peer's own files gave, taken out of its wheel, is data/by_source.json.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from nvfp4lab.checks import unknown
from nvfp4lab.formats import E4M3, E8M0, INT4, UE5M3
from nvfp4lab.rules import FLOAT32_MAX, Elements, Outer, Recipe, Scale, Search, Specials

NVFP4 = Recipe(
    "nvfp4",
    "Divides by the decoded scale as if exactly; no outer scale, gradual subnormal scales.",
    "This package; element rounding as PTX cvt.rn.satfinite.e2m1x2.",
)

_TENSOR = replace(
    NVFP4,
    name="nvfp4-tensor",
    summary="One outer scale amax / 2688 for the tensor, or a calibrated one.",
    outer=Outer(per="tensor"),
)

_SEED = Recipe(
    "seed",
    "The user's kernel bit for bit, faults kept: an unsigned exponent that wraps below 2**-7.",
    "nvfp4lab/kernels/seed.py",
    Scale(
        amax_floor=1e-4,
        rounding="ties-away",
        subnormals="exponent-wraps",
        overflow="mantissa-kept",
    ),
    Elements(
        formula="x * (1 / (s * g))",
        scale_read="encoder's",
        rounding="ties-away",
        zero_sign="from nonzero",
    ),
    specials=Specials(nan_in_amax="ignored", nan_code=0xF, zero_divisor=1e-6),
)

_MXFP4 = Recipe(
    "mxfp4-floor",
    "Power-of-two scales 2**(floor(log2 amax) - 2): the block's largest may saturate.",
    "OCP Microscaling Formats 1.0, section 6.3; torchao 0.18.0, torchao/prototype/mx_formats/"
    "mx_tensor.py, FLOOR",
    Scale(format=E8M0, block=32, divisor=4.0, rounding="down"),
)

# As a peer handles NaN and Inf that leaves them to the arithmetic.
_IEEE_OUTER = Outer(per="tensor", of_zero=None, nan_in_amax="propagates", inf_in_amax="kept")

_FOUR_OVER_SIX = Recipe(
    "fouroversix",
    "Tries the scale and 1.5 times the scale, keeps the smaller squared error (4/6).",
    "fouroversix 1.0.5, fouroversix/quantize/pytorch/reference.py, scale rule mse",
    Scale(formula="amax / d * G"),
    Elements(formula="x * (1 / (s * g))", overflow="sign bit", zero_sign="from nonzero"),
    replace(_IEEE_OUTER, formula="G = n / amax", range=6.0 * 256.0, of_zero=1.0),
    Specials(
        invalid_scale_code=0xFF,
        nan_code=0xB,
        zero_scale="codes +0",
        zero_divisor=0.0,
        inf_over_inf="NaN",
    ),
    Search(factors=(1.0, 1.5), decoding="v * s * amax / n"),
)


def _four_over_six(name: str, criterion: Literal["mae", "max"], rule: str, error: str) -> Recipe:
    return replace(
        _FOUR_OVER_SIX,
        name=name,
        summary=f"Tries the scale and 1.5 times the scale, keeps the smaller {error} (4/6).",
        source=_FOUR_OVER_SIX.source.replace("mse", rule),
        search=Search((1.0, 1.5), criterion, "v * s * amax / n"),
    )


_RECIPES = {
    recipe.name: recipe
    for recipe in (
        NVFP4,
        replace(
            NVFP4,
            name="nvfp4-token",
            summary="A power of two for each token above the scales, so that division stays exact.",
            outer=Outer(
                per="token",
                rounding="up to a power of two",
                floor=2.0**-100,
                ceiling=2.0**117,
                divides="input",
            ),
        ),
        _TENSOR,
        replace(
            NVFP4,
            name="nvfp4-exact-scale",
            summary="amax / 6 kept in float32: the error of E2M1 alone, the theory's baseline.",
            scale=Scale(format=None),
        ),
        replace(
            NVFP4,
            name="nvfp4-stochastic",
            summary="Unbiased random rounding; scales 17/16 up, so normal ones saturate nothing.",
            scale=Scale(factor=17 / 16),
            elements=Elements(rounding="stochastic"),
        ),
        replace(
            NVFP4,
            name="nvfp4-search",
            summary="Tries every scale code, keeps the smallest squared error: the lower bound.",
            search=Search(factors=None, precision="float64"),
        ),
        replace(
            NVFP4,
            name="nvfp4-ue5m3",
            summary="UE5M3 scales: one exponent bit more in place of the sign, down to 2**-17.",
            source="Is Finer Better?, arXiv 2601.19026",
            scale=Scale(format=UE5M3),
        ),
        replace(
            NVFP4,
            name="cublas",
            summary="Multiplies by the rounded reciprocal of the decoded scale.",
            source="NVIDIA cuBLAS documentation, 1D block scaling for FP4; by source only",
            elements=Elements(formula="x * (1 / (s * g))"),
        ),
        replace(
            NVFP4,
            name="nvint4",
            summary="Integers from -7 to 7 under the same E4M3 scales, which are amax / 7.",
            source="INT v.s. FP, arXiv 2510.25602",
            scale=Scale(divisor=7.0),
            elements=Elements(format=INT4),
        ),
        _MXFP4,
        replace(
            _MXFP4,
            name="mxfp4-ceil",
            summary="Power-of-two scales 2**ceil(log2(amax / 6)): nothing saturates.",
            source="torchao 0.18.0, torchao/prototype/mx_formats/mx_tensor.py, RCEIL; DeepGEMM",
            scale=Scale(format=E8M0, block=32, rounding="up"),
        ),
        replace(
            _MXFP4,
            name="mxfp4-even",
            summary="As floor, of amax rounded to one mantissa bit: up from 1.75 * 2**n.",
            source="torchao 0.18.0, torchao/prototype/mx_formats/mx_tensor.py, EVEN; AMD Quark",
            scale=Scale(format=E8M0, block=32, divisor=4.0, rounding="up-from-three-quarters"),
        ),
        Recipe(
            "mxfp8-deepseek-v4",
            "FP8 elements under power-of-two scales of 32, rounded up: DeepSeek V4's own staging.",
            "vLLM 0.33.0, vllm/model_executor/layers/fused_moe/prepare_megamoe.py; by source only",
            Scale(format=E8M0, block=32, divisor=448.0, amax_floor=1e-4, rounding="up"),
            Elements(format=E4M3, formula="x * (1 / (s * g))"),
            specials=Specials(nan_in_amax="ignored", nan_code=0x7F),
        ),
        _SEED,
        replace(
            _SEED,
            name="seed-as-meant",
            summary="The user's kernel with a signed exponent; its other faults kept.",
            source="nvfp4lab/kernels/seed.py, read as it was meant",
            scale=replace(_SEED.scale, subnormals="implicit-bit-lost"),
        ),
        Recipe(
            "vllm-megamoe",
            "Divides the token by its outer scale first; scales are never below 2**-9.",
            "vLLM 0.33.0, vllm/model_executor/layers/fused_moe/prepare_megamoe.py; by source only",
            Scale(formula="amax * (1 / d)", floor=2.0**-9),
            Elements(zero_sign="dropped"),
            Outer(
                per="token",
                formula="g = amax * (1 / n)",
                amax_floor=1e-12,
                of_zero=None,
                inf_in_amax="kept",
                divides="input",
            ),
            Specials(nan_in_amax="ignored", nan_code=0x0, inf_over_inf="NaN"),
        ),
        Recipe(
            "vllm-muse",
            "No outer scale, scales never below 2**-9; NaN is passed over and becomes 0.",
            "vLLM 0.33.0, vllm/models/muse_spark/nvidia/ops/prepare_megamoe_nvfp4.py; "
            "by source only",
            Scale(formula="amax * (1 / d)", floor=2.0**-9),
            Elements(zero_sign="dropped"),
            specials=Specials(nan_in_amax="ignored", nan_code=0x0),
        ),
        Recipe(
            "vllm-reference",
            "Multiplies by reciprocals, of which that of 0 is 1e-8: a zero scale may keep codes.",
            "vLLM 0.33.0, vllm/model_executor/layers/quantization/utils/nvfp4_emulation_utils.py; "
            "by source only. It gives values, not codes: NaN has none, 0x7 here",
            Scale(formula="G * (amax * (1 / d))"),
            Elements(formula="x * (1 / (s * g))", zero_sign="from nonzero"),
            replace(_IEEE_OUTER, formula="G = n / amax", reciprocal_of_zero=1e-8),
            Specials(zero_divisor=1e8, invalid_scale_code=0xFF, inf_over_inf="NaN"),
        ),
        Recipe(
            "sgl-megamoe",
            "An outer scale for each token, its amax at least 1e-4; multiplies by the reciprocal.",
            "sgl-deep-gemm 0.2.5, deep_gemm/include/deep_gemm/impls/"
            "sm100_mega_moe_pre_dispatch.cuh; by source only",
            Scale(formula="amax / (d * g)"),
            Elements(formula="x * (1 / (s * g))", zero_sign="dropped"),
            Outer(per="token", amax_floor=1e-4, of_zero=None, inf_in_amax="kept"),
            Specials(nan_in_amax="ignored", nan_code=0x0, invalid_scale_code=0x7F),
        ),
        Recipe(
            "transformer-engine",
            "Folds 1/6 into the encode scale; reciprocals are capped at the largest float32.",
            "TransformerEngine 2.20.2, transformer_engine/pytorch/custom_recipes/"
            "reference_nvfp4.py; by source only. A NaN scale is 0x7F, or 0xFF in vector lanes",
            Scale(formula="amax * (G * (1 / d))"),
            Elements(formula="x * min(1 / (s * g), FLOAT32_MAX)", zero_sign="from nonzero"),
            replace(_IEEE_OUTER, formula="G = n / amax", ceiling=FLOAT32_MAX, of_inf=1.0),
            Specials(nan_code=0x0, invalid_scale_code=0x7F, zero_divisor=0.0, inf_over_inf="NaN"),
        ),
        Recipe(
            "torchao",
            "Scales are never subnormal: 2**-6 at the least; multiplies by (1 / g) / s.",
            "torchao 0.18.0, torchao/prototype/mx_formats/nvfp4_tensor.py",
            Scale(floor=2.0**-6),
            Elements(formula="x * (G / s)"),
            _IEEE_OUTER,
            Specials(
                invalid_scale_code=0xFF,
                nan_code=0x3,
                nan_scale_nan_code=0x4,
                nan_sign="x86",
                inf_over_inf="NaN",
            ),
        ),
        Recipe(
            "modelopt",
            "A block without magnitude gets scale 1; the others at least 2**-9.",
            "nvidia-modelopt 0.47.0, modelopt/torch/quantization/qtensor/nvfp4_tensor.py",
            Scale(formula="amax / (d * g)", of_raw_zero=1.0, floor=2.0**-9),
            Elements(zero_sign="from nonzero"),
            _IEEE_OUTER,
            Specials(
                nan_scale_code=0xFF, invalid_scale_code=0xFF, zero_divisor=0.0, inf_over_inf="NaN"
            ),
        ),
        Recipe(
            "compressed-tensors",
            "Stores the encode scale, rounded in the input's dtype; a zero scale becomes 0.125.",
            "compressed-tensors 0.20.0, compressed_tensors/quantization/utils/helpers.py and "
            "quantization/lifecycle/forward.py",
            Scale(formula="amax / d * G", precision="input's", of_zero=0.125),
            Elements(formula="x / (s / G)", zero_sign="from nonzero"),
            replace(
                _IEEE_OUTER,
                formula="G = (1 / amax) * n",
                precision="input's",
                amax_floor="smallest normal",
                of_nonfinite=1.0,
            ),
            Specials(
                nan_scale_code=0xFF, invalid_scale_code=0xFF, nan_code=0x0, inf_over_inf="NaN"
            ),
        ),
        _FOUR_OVER_SIX,
        _four_over_six("fouroversix-mae", "mae", "mae", "absolute error"),
        _four_over_six("fouroversix-max", "max", "abs_max", "largest error"),
        replace(
            _FOUR_OVER_SIX,
            name="fouroversix-static6",
            summary="Outer scale 1 / (2688 / amax); an unrounded magnitude from 7 up becomes -0.",
            source=_FOUR_OVER_SIX.source.replace("mse", "static_6"),
            outer=replace(_IEEE_OUTER, formula="G = n / amax", of_zero=1.0),
            search=None,
        ),
        Recipe(
            "llama.cpp",
            "Scales half up, subnormal ones capped, all from 248 up 448; elements half to zero.",
            "llama-cpp-python 0.3.36, vendor/llama.cpp/ggml/src/ggml-quants.c and ggml-impl.h",
            Scale(rounding="ties-away", subnormals="capped", overflow="top binade"),
            Elements(formula="x", rounding="least distance", zero_sign="dropped"),
            specials=Specials(nan_in_amax="ignored", nan_code=0x0),
        ),
        Recipe(
            "mlx",
            "Quotients are rounded to the input's dtype; elements half to zero, NaN scale 0x7E.",
            "mlx 0.32.4 on a CPU, mlx/backend/cpu/quantized.cpp; with a global scale",
            Scale(formula="amax / d * G", precision="input's"),
            Elements(
                formula="x / s * G",
                precision="input's",
                rounding="least distance",
                zero_sign="dropped",
            ),
            replace(_IEEE_OUTER, formula="G = n / amax"),
            Specials(
                nan_scale_code=0x7E,
                outer_nan_scale_code=0x7E,
                invalid_scale_code=0xFE,
                nan_code=0x0,
                zero_divisor=0.0,
                inf_over_inf="NaN",
            ),
        ),
        Recipe(
            "fp-quant",
            "Ties to zero; zero and small negatives are -0; no floor, so a zero block is 0 / 0.",
            "fp-quant 0.3.2, fp_quant/module/triton/nvfp4.py; by source only, with IEEE "
            "divisions: compiled, its own are approximate and move ties",
            Scale(formula="G * amax / d"),
            Elements(formula="x * G / s", rounding="ties-to-zero", zero_sign="unless positive"),
            replace(_IEEE_OUTER, formula="G = n / amax", of_zero=1.0),
            Specials(invalid_scale_code=0x7F, nan_code=0x8, zero_divisor=0.0, inf_over_inf="NaN"),
        ),
    )
}


def recipes() -> tuple[str, ...]:
    """The names that `recipe` knows.

    >>> recipes()[0]
    'nvfp4'
    """
    return tuple(_RECIPES)


def recipe(name: str | Recipe) -> Recipe:
    """The recipe of that name; a `Recipe` is given back as it is.

    Raises: ValueError for an unknown name (with the nearest ones), TypeError for anything else.

    >>> recipe("nvfp4-token").outer.per
    'token'
    """
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a recipe is a name or a Recipe, got {type(name).__name__}")
    if name not in _RECIPES:
        raise ValueError(unknown("recipe", name, _RECIPES))
    return _RECIPES[name]
