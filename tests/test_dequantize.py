"""The dequantize kernel against the torch path, bit for bit: every code under every scale.

Tests run in the interpreter and, marked `gpu`, compiled. May be changed: recipes, outer scales and
shapes may be added to the tables.
"""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import nvfp4lab as nv
from nvfp4lab import quantized
from nvfp4lab.kernels import dequantize
from nvfp4lab.quantized import DTYPES, Quantized
from nvfp4lab.rules import Outer, Recipe

# The interpreter computes with numpy, which warns of the NaN and overflows that are tested here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEED = 2112
INF, NAN = math.inf, math.nan
BYTE_SCALED = ("nvfp4", "nvfp4-ue5m3", "mxfp4-floor")  # one for each scale format
OUTERS = (
    1.0, 2.0**-100, 2.0**117, 0.3, -1.7e-3, 123.456, 1.1e35, 0.0, -0.0, INF, -INF, NAN,
    2.0**-149, 1.7e-38, torch.finfo(torch.float32).max,
)  # fmt: skip
FLOAT_SCALES = (
    0.0, -0.0, 1.0, 1 / 3, -0.1, 65504 / 6, 1.1e4, 5.6e37, 5.7e37, 2.0**127, -3.4e38, 1e-38,
    2.0**-149, 3e-45, INF, -INF, NAN,
)  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def moved(q: Quantized, device: str) -> Quantized:
    outer = None if q.outer is None else q.outer.to(device)
    return Quantized(q.codes.to(device), q.scales.to(device), outer, q.recipe)


def by_kernel(q: Quantized, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What the kernel writes, on the CPU; it has written all of it and nothing beside it."""
    size, guard, marker = math.prod(q.shape), 64, -7.0
    whole = torch.full((size + 2 * guard,), marker, dtype=dtype, device=device)
    out = whole[guard : size + guard].view(q.shape)
    moved(q, device)._launch_kernel(out)
    assert (whole[:guard] == marker).all() and (whole[size + guard :] == marker).all()
    return out.cpu()


def in_torch(q: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The torch path's values, whichever path `dequantize` takes."""
    blocks = q.decode_blocks(0, q.scales.numel(), torch.finfo(dtype).max)
    return blocks.to(dtype).view(q.shape)


def require_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, or NaN in both."""
    bits = torch.int32 if want.dtype == torch.float32 else torch.int16
    differ = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    where = differ.nonzero()[:10].tolist()
    assert not where, [(at, got[tuple(at)].item(), want[tuple(at)].item()) for at in where]


def every_code(scales: torch.Tensor, recipe: Recipe, outer: torch.Tensor | None) -> Quantized:
    """Every code under every one of scales [n]; a row of it for each outer scale (rows, 1)."""
    rows = 1 if outer is None else outer.numel()
    codes = torch.arange(0x10, 0x100, 0x22, dtype=torch.uint8)  # 0x10, 0x32, ... 0xFE
    repeats = rows, len(scales), recipe.scale.block // 16
    return Quantized(codes.repeat(*repeats).view(rows, -1), scales.expand(rows, -1), outer, recipe)


def with_token_outer(name: str) -> Recipe:
    return replace(nv.recipe(name), outer=Outer(per="token"))


ALL_BYTES = torch.arange(256, dtype=torch.uint8)
ALL_OUTERS = torch.tensor(OUTERS)[:, None]


@each_dtype
@pytest.mark.parametrize("name", BYTE_SCALED)
def test_every_code_under_every_scale_byte(name, dtype, device):
    q = every_code(ALL_BYTES, nv.recipe(name), None)
    require_same(by_kernel(q, dtype, device), in_torch(q, dtype))


@each_dtype
@pytest.mark.parametrize("name", BYTE_SCALED)
def test_every_code_under_every_scale_byte_and_outer_scale(name, dtype, device):
    q = every_code(ALL_BYTES, with_token_outer(name), ALL_OUTERS)
    require_same(by_kernel(q, dtype, device), in_torch(q, dtype))


@each_dtype
@pytest.mark.parametrize("outer", [0.3, 1.1e35, NAN])
def test_every_code_under_every_scale_byte_and_an_outer_scale_of_the_tensor(outer, dtype, device):
    q = every_code(ALL_BYTES, nv.recipe("nvfp4-tensor"), torch.tensor(outer))
    require_same(by_kernel(q, dtype, device), in_torch(q, dtype))


@each_dtype
def test_every_code_under_float32_scales(dtype, device):
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    any_bits = torch.randint(-(2**31), 2**31, (495,), generator=generator).to(torch.int32)
    scales = torch.cat((torch.tensor(FLOAT_SCALES), any_bits.view(torch.float32)))
    for recipe, outer in (
        (nv.recipe("nvfp4-exact-scale"), None),
        (with_token_outer("nvfp4-exact-scale"), ALL_OUTERS),
    ):
        q = every_code(scales, recipe, outer)
        require_same(by_kernel(q, dtype, device), in_torch(q, dtype))


def test_an_inf_scale_gives_inf_and_an_overflow_the_largest_finite_value(device):
    """By hand: codes 0, 1, 7 and 15 under an Inf and under 2^127."""
    recipe = nv.recipe("nvfp4-exact-scale")
    codes = torch.tensor([[0x10, 0xF7, 0, 0, 0, 0, 0, 0]] * 2, dtype=torch.uint8)
    q = Quantized(codes, torch.tensor([[INF], [2.0**127]]), None, recipe)
    got = by_kernel(q, torch.bfloat16, device)[:, :4].float().tolist()
    largest = torch.finfo(torch.bfloat16).max
    assert math.isnan(got[0][0]) and got[0][1:] == [INF, INF, -INF]
    assert got[1] == [0.0, 2.0**126, largest, -largest]


def random_bytes(shape: tuple[int, ...], recipe: Recipe, seed: int = SEED) -> Quantized:
    """Any bytes as codes and scales of a tensor of that shape, with outer scales 0.1 to 1.1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    rows, width = shape[:-1], shape[-1]
    outer = None
    if recipe.outer is not None:
        outer_shape = () if recipe.outer.per == "tensor" else (*rows, 1)
        outer = torch.rand(outer_shape, generator=generator) + 0.1
    scales = draw(*rows, width // recipe.scale.block)
    return Quantized(draw(*rows, width // 2), scales, outer, recipe)


@each_dtype
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-token", "nvfp4-tensor", "mxfp4-even"])
@pytest.mark.parametrize(
    "shape", [(32,), (1, 32), (5, 96), (2, 3, 160), (1, 4064), (3, 4128), (0, 64), (3, 0)], ids=str
)
def test_any_shape(shape, name, dtype, device):
    """One block, part of a program, all but one block of one, one more, none."""
    q = random_bytes(shape, nv.recipe(name))
    require_same(by_kernel(q, dtype, device), in_torch(q, dtype))


@each_dtype
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_bytes_at_any_address(offset, dtype, device):
    q = random_bytes((3, 48), nv.recipe("nvfp4-token"))

    def shifted(t: torch.Tensor) -> torch.Tensor:
        place = torch.zeros(t.numel() + offset, dtype=t.dtype, device=device)[offset:]
        return place.view(t.shape).copy_(t)

    assert q.outer is not None
    there = Quantized(shifted(q.codes), shifted(q.scales), shifted(q.outer), q.recipe)
    assert there.codes.data_ptr() % 16 == offset
    require_same(by_kernel(there, dtype, device), in_torch(q, dtype))


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_more_rows_than_a_grid_has_in_one_direction(rows, monkeypatch, device):
    """Slabs of two rows; with five, the last slab has a row that is not there."""
    monkeypatch.setattr(dequantize, "LARGEST_GRID_Y", 2)
    q = random_bytes((rows, 48), nv.recipe("nvfp4-token"))
    require_same(by_kernel(q, torch.bfloat16, device), in_torch(q, torch.bfloat16))


def test_the_interpreters_bf16_rounding(device):
    """_to_bf16 on every upper half of a float32 with lower halves on and beside the ties."""
    upper = torch.arange(1 << 16)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    values = (upper | lower).flatten().to(torch.int32).view(torch.float32)
    got = torch.empty(values.shape, dtype=torch.bfloat16, device=device)
    step = 1 << 17
    round_to_bf16[(len(values) // step,)](values.to(device), got, SIZE=step)  # pyright: ignore[reportArgumentType]
    require_same(got.cpu(), values.to(torch.bfloat16))


@triton.jit
def round_to_bf16(value, rounded, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(rounded + at, dequantize._to_bf16(tl.load(value + at)))


# ---- Which path dequantize takes ----


def test_e2m1_recipes_have_a_kernel_and_the_others_do_not():
    without = {name for name in nv.recipes() if not quantized._has_kernel(nv.recipe(name))}
    assert without == {"nvint4", "mxfp8-deepseek-v4"}


@pytest.mark.parametrize("block", [8, 48, 64])
def test_other_blocks_have_no_kernel(block):
    recipe = nv.recipe("nvfp4")
    assert not quantized._has_kernel(recipe.changed({"scale.block": block}))


def test_a_cpu_tensor_takes_the_torch_path():
    assert not quantized.runs_kernels("cpu")


def test_dequantize_takes_the_kernel_where_it_runs(monkeypatch, interpreter):
    """Every recipe's dequantize, as on a GPU: a launch for each that has a kernel, and its bits."""
    monkeypatch.setattr(quantized, "runs_kernels", lambda _: True)
    launches = []
    launch = dequantize.launch
    monkeypatch.setattr(dequantize, "launch", lambda *a, **k: launches.append(1) or launch(*a, **k))
    for name in nv.recipes():
        q = nv.quantize(torch.randn(3, 96, generator=torch.Generator().manual_seed(SEED)), name)
        before = len(launches)
        got = q.dequantize(torch.bfloat16)
        assert len(launches) - before == quantized._has_kernel(q.recipe), name
        require_same(got, in_torch(q, torch.bfloat16))


@each_dtype
@pytest.mark.parametrize("name", nv.recipes())
def test_dequantize_gives_the_bits_of_the_cpu(name, dtype, gpu):
    x = torch.randn(300, 1056, generator=torch.Generator().manual_seed(SEED)) * 100
    q = nv.quantize(x, name)
    require_same(moved(q, gpu).dequantize(dtype).cpu(), q.dequantize(dtype))


def test_an_outer_scale_on_the_cpu_is_brought_over(gpu):
    q = random_bytes((3, 64), nv.recipe("nvfp4-tensor"))
    there = Quantized(q.codes.to(gpu), q.scales.to(gpu), q.outer, q.recipe)
    require_same(there.dequantize().cpu(), q.dequantize())


def test_nothing_is_allocated_but_the_output(gpu):
    q = moved(random_bytes((1024, 4096), nv.recipe("nvfp4")), gpu)
    q.dequantize(torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = q.dequantize(torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before == out.nbytes


def test_one_compiled_kernel_serves_every_size(gpu):
    def compiled() -> int:
        return len(dequantize._dequantize.device_caches[torch.cuda.current_device()][0])

    by_kernel(random_bytes((4, 64), nv.recipe("nvfp4-token")), torch.bfloat16, gpu)
    before = compiled()
    for shape in [(1, 16), (1, 4096), (17, 7168), (1000, 16), (16, 16 * 1023)]:
        by_kernel(random_bytes(shape, nv.recipe("nvfp4-token")), torch.bfloat16, gpu)
    assert compiled() == before


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-token"])
def test_more_than_2_to_the_31_elements(name, gpu):
    """Rows at both ends and around element 2^31, of 2^31 + 2^20 elements: 6 GB."""
    needed = 8 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    width = 1024
    rows = (2**31 + 2**20) // width
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=gpu)
    scales = torch.randint(0, 256, (rows, width // 16), dtype=torch.uint8, device=gpu)
    recipe = nv.recipe(name)
    outer = torch.rand(rows, 1, device=gpu) if recipe.outer else None
    got = Quantized(codes, scales, outer, recipe).dequantize(torch.bfloat16)
    for row in (0, 65535, 2**31 // width - 1, rows - 2):
        part = slice(row, row + 2)
        o = None if outer is None else outer[part].cpu()
        q = Quantized(codes[part].cpu(), scales[part].cpu(), o, recipe)
        require_same(got[part].cpu(), in_torch(q, torch.bfloat16))
