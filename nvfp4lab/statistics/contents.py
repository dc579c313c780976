"""What `Statistics` holds: its fields, and how they all start at nothing.

The names, dtypes and shapes are here and nowhere else: `tally` fills what `empty` gives it,
`merging` adds two field by field, and writes them down. To add a count or a sum, add its field,
its shape if it is an array, its line in `in_torch` and in the kernel behind `in_triton`, and raise
`merging.VERSION`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from nvfp4lab.formats import Format
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import bins

CHANNELS = ("channel_xx", "channel_ee", "channel_xq")
WORST = {  # the columns of `worst`, a row a block
    "source": "U1",  # the file or site that it is from
    "token": np.int64,  # row in the source
    "block": np.int64,  # in the row
    "lost": np.int64,  # elements in nonfinite_output
    "ee": np.float64,
    "amax": np.float32,  # the largest finite |x|
    "scale_code": np.int64,  # -1 where scales are float32
    "scale": np.float32,
    "outer": np.float32,  # NaN where the recipe has none
    "x": np.float32,  # [block]
}


@dataclass(frozen=True, eq=False, repr=False)
class Contents:
    """Counts, sums and histograms of x against its decoded form q, under one recipe.

    An element is counted, and enters the sums, where both x and q are finite; e = q - x; s is its
    block's decoded scale, g the outer scale (1 without one). Arrays are int64 or float64.
    """

    recipe: str  # its name
    digest: str  # of all its decisions: two recipes of one name are not mixed up
    element_format: str
    scale_format: str | None  # None: float32 scales
    block: int
    quotient_width: float  # of a bin of |x| / (s g)
    magnitude_of_code: np.ndarray  # each element code's index in Format.magnitudes, -1 for none

    width: int | None  # K; None without channels
    tokens: int  # rows of K elements
    elements: int
    nonfinite_input: int  # elements of x that are NaN or Inf
    nonfinite_output: int  # finite elements of x that decode to NaN or Inf
    nonzero: int  # counted elements with x != 0
    flushed: int  # of these, the ones that decode to zero
    saturated: int  # counted elements beyond what the largest code of their block decodes to; where
    # that is zero there are none, all are flushed
    blocks: int
    scale_zero: int  # blocks by the class of their scale code
    scale_subnormal: int
    scale_normal: int
    scale_saturated: int  # the format's largest
    scale_nan: int
    element_codes: np.ndarray  # [2**bits] how often each code occurs
    scale_codes: np.ndarray  # [256]; of float32 scales [0]

    sum_xx: float
    sum_qq: float
    sum_xq: float
    sum_ee: float
    sum_abs_e: float
    sum_e: float
    sum_ee_max: float  # the part of sum_ee on each block's first counted element of largest |x|
    sum_ee_other: float  # on its other elements
    sum_ee_zero_scale: float  # on all elements of blocks whose scale decodes to zero
    max_abs_e: float
    max_rel_e: float  # the largest |e| / |x| with x != 0
    amax: float  # the largest finite |x|

    crest_blocks: int  # blocks of finite x, not all zero: those with a crest factor, amax / rms
    sum_crest: float
    crest_counts: np.ndarray  # [128] these blocks by crest factor
    amax_blocks: np.ndarray  # [278] all blocks by the exponent of their largest finite |x|
    amax_lost: np.ndarray  # [278] their elements in nonfinite_output
    amax_xx: np.ndarray  # [278]
    amax_ee: np.ndarray  # [278]
    quotient_elements: np.ndarray  # [113] counted elements with 0 < s g < Inf, by |x| / (s g)
    quotient_e: np.ndarray  # [113] sum of e / (s g), positive away from zero; x = 0 has none
    quotient_ee: np.ndarray  # [113] sum of (e / (s g))^2, that of x = 0 too
    block_qsnr: np.ndarray  # [123] blocks by QSNR
    token_qsnr: np.ndarray  # [123] rows by QSNR

    channel_xx: np.ndarray  # [K], or [0] without channels
    channel_ee: np.ndarray
    channel_xq: np.ndarray
    worst: Mapping[str, np.ndarray]  # up to ten blocks with an error, the worst first: WORST

    @classmethod
    def empty(cls, recipe: Recipe, width: int) -> Self:
        """Of no rows with K = width: what everything of that recipe adds up from."""
        elements, scale = recipe.elements.format, recipe.scale
        shapes = arrays_of(2**elements.bits, scale.format is not None, width)
        values: dict = {f.name: 0 if f.type == "int" else 0.0 for f in fields(cls)}
        values |= {name: np.zeros(*described) for name, described in shapes.items()}
        values |= {
            "recipe": recipe.name,
            "digest": digest(recipe),
            "element_format": elements.name,
            "scale_format": None if scale.format is None else scale.format.name,
            "block": scale.block,
            "quotient_width": bins.quotient_width(elements.max),
            "magnitude_of_code": _magnitude_of_code(elements),
            "width": width,
            "worst": {
                name: np.zeros((0, scale.block) if name == "x" else 0, dtype)
                for name, dtype in WORST.items()
            },
        }
        return cls(**values)


def arrays_of(codes: int, has_scale_codes: bool, width: int | None) -> dict[str, tuple[int, type]]:
    """Length and dtype of each array for a format of so many element codes, and rows of `width`."""
    return {
        "magnitude_of_code": (codes, np.int64),
        "element_codes": (codes, np.int64),
        "scale_codes": (256 if has_scale_codes else 0, np.int64),
        "crest_counts": (bins.CREST_COUNT, np.int64),
        "amax_blocks": (bins.AMAX_COUNT, np.int64),
        "amax_lost": (bins.AMAX_COUNT, np.int64),
        "amax_xx": (bins.AMAX_COUNT, np.float64),
        "amax_ee": (bins.AMAX_COUNT, np.float64),
        "quotient_elements": (bins.QUOTIENT_COUNT, np.int64),
        "quotient_e": (bins.QUOTIENT_COUNT, np.float64),
        "quotient_ee": (bins.QUOTIENT_COUNT, np.float64),
        "block_qsnr": (bins.QSNR_COUNT, np.int64),
        "token_qsnr": (bins.QSNR_COUNT, np.int64),
        **dict.fromkeys(CHANNELS, (width or 0, np.float64)),
    }


def digest(recipe: Recipe) -> str:
    """Sixteen hexadecimal digits that differ when anything in two recipes does."""
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]


def _magnitude_of_code(fmt: Format) -> np.ndarray:
    """int64 [2**bits]: the index of each code's magnitude; -1 below -max in two's complement."""
    index = {magnitude: i for i, magnitude in enumerate(fmt.magnitudes) if i != fmt.nan_code}
    of_nan = -1 if fmt.nan_code is None else fmt.nan_code
    return np.array([index.get(abs(v), -1) if v == v else of_nan for v in fmt.values], np.int64)
