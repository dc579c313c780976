"""CONTRIBUTING.md holds: each of its examples, put where the text says, does what the text says.

The code is taken out of the page, so what is tested is what is read. May be changed: what is asked
of an example. May not: the place that it is put in, without the text.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import test_catalogue
import test_formats
import test_imports
import test_plots_layers
import test_rules
import torch

import nvfp4lab as nv
from nvfp4lab import catalogue, cli, formats, lookup, plots
from nvfp4lab.blocks import quantize_blocks
from nvfp4lab.outer import OuterScale
from nvfp4lab.plots import layers

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def examples(heading: str) -> list[str]:
    """The code blocks under a heading, in order."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)


def define(code: str, module: ModuleType, name: str):
    """What the code, written at the end of the module, calls by that name."""
    names = dict(vars(module))
    exec(code, names)
    return names[name]


# ---- A recipe ----

ENTRY, ROW, BY_HAND = examples("Add a recipe")
NAME = "half-up-floor"


@pytest.fixture
def half_up_floor(monkeypatch) -> nv.Recipe:
    entry = eval(ENTRY, dict(vars(catalogue)))
    monkeypatch.setitem(catalogue._RECIPES, entry.name, entry)
    return entry


def test_the_recipe_is_known_by_its_name(half_up_floor):
    assert nv.recipes()[-1] == NAME
    assert nv.recipe(NAME) is half_up_floor


def test_the_recipe_differs_from_nvfp4_in_what_it_says(half_up_floor):
    assert set(half_up_floor.differences(nv.recipe("nvfp4"))) == {
        "scale.rounding",
        "scale.floor",
        "elements.rounding",
    }


def test_the_recipe_says_what_every_recipe_says(half_up_floor):
    test_rules.test_recipe_says_what_sets_it_apart_and_where_it_is_from(NAME)
    test_rules.test_no_two_named_recipes_decide_alike()


def test_the_row_of_the_readme_is_the_recipes_summary(half_up_floor):
    assert ROW.strip().lower() == f"| `{NAME}` | {half_up_floor.summary[:-1].lower()} |"


def test_the_recipe_gives_what_was_worked_out_on_paper(half_up_floor):
    define(BY_HAND, test_catalogue, "test_half_up_floor")()


def test_identify_names_the_recipe(half_up_floor):
    x = nv.probe()
    q = nv.quantize(x, NAME)
    found = nv.identify(x, q.codes, q.scales)
    assert found.explained and found.recipe is not None and found.recipe.name == NAME


def test_the_commands_know_the_recipe(half_up_floor, tmp_path, capsys):
    site = nv.activations("smollm2")[0].rows(0, 4)
    nv.records.save_activations(tmp_path / "site.safetensors", site)
    out = tmp_path / "errors.csv"
    assert cli.main(["sweep", str(tmp_path), "--recipes", NAME, "--out", str(out)]) == 0
    (row,) = pd.read_csv(out).to_dict("records")
    assert row["recipe"] == NAME
    assert row["qsnr_db"] == pytest.approx(nv.measure(site.hidden, NAME).qsnr_db)


# ---- A format ----

CONSTANT, USED = examples("Add a format")


@pytest.fixture
def e3m0(monkeypatch) -> formats.Format:
    found = define(CONSTANT, formats, "E3M0")
    monkeypatch.setattr(formats, "E3M0", found, raising=False)
    return found


def test_the_format_has_the_values_that_its_docstring_lists(e3m0):
    listed = re.findall(r"[\d.]+(?=[,;])", CONSTANT.partition('"""')[2])
    assert [float(value) for value in listed] == list(e3m0.values[:8])


def test_the_tests_of_formats_take_the_format(e3m0):
    test_formats.test_every_value_encodes_to_its_own_code(e3m0)
    test_formats.test_limits(e3m0, None, 0.25, 16.0)
    test_formats.test_classes_are_counted(e3m0, 2, 0, 14, 0)


@pytest.mark.parametrize("rounding", ["ties-to-even", "ties-away", "down", "toward-zero"])
def test_the_format_rounds_by_exact_distances(e3m0, rounding):
    steps = torch.arange(0, 20 * 64) / 64  # every midpoint is among them
    want = [
        test_formats.rounded(e3m0, test_formats.Fraction(value), rounding)
        for value in steps.tolist()
    ]
    assert e3m0.encode(steps, rounding).tolist() == want


def test_the_format_works_from_quantize_to_the_theory(e3m0):
    exec(USED, {"nv": nv, "torch": torch})


def test_the_table_of_the_format_gives_the_bytes_of_the_reference(e3m0):
    names: dict[str, Any] = {"nv": nv, "torch": torch}
    exec(USED.partition("x = ")[0], names)
    recipe = names["recipe"]
    assert lookup.table_of(recipe) is not None
    bits = torch.randint(-(2**15), 2**15, (2**15, 16), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int16).view(torch.bfloat16)
    one = OuterScale.one(x.device)
    codes, scales = quantize_blocks(x.float(), one, recipe, x.dtype)
    got = nv.quantize(x, recipe)
    assert got.element_codes().equal(codes.to(torch.uint8))
    assert got.scales.flatten().equal(scales.flatten())


# ---- A capture backend ----

(BACKEND,) = examples("Add a capture backend")


class Layer(torch.nn.Module):
    def forward(self, hidden, ids, weights):
        return hidden + 1


class Engine(torch.nn.Module):
    """Two layers whose experts add one; every token goes to experts 0 and 1."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, positions):
        hidden = positions[:, None].expand(-1, 32).float()
        ids = torch.arange(2).expand(len(positions), 2)
        for layer in self.layers:
            hidden = layer(hidden, ids, torch.full(ids.shape, 0.5))
            if (positions < 0).any():
                raise ValueError("a position below 0")
        return hidden


@pytest.fixture
def tiny_engine(tmp_path, monkeypatch):
    """The function of the page's module, imported under the name that the page gives it."""
    name = "nvfp4lab.capture.tiny_engine"
    path = tmp_path / "tiny_engine.py"
    path.write_text(BACKEND, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.tiny_engine


ABOUT = {"is": "what enters the experts of the tiny engine"}


def test_the_backend_records_two_passes(tiny_engine, tmp_path):
    engine = Engine()
    with tiny_engine(engine, tmp_path / "tiny", provenance=ABOUT) as recorder:
        engine(torch.arange(5))
        engine(torch.arange(5, 8))
    assert recorder.passes == 2
    sites = nv.load_activations(tmp_path / "tiny", sha256=True)
    assert [site.layer for site in sites] == [0, 1]
    for site in sites:
        assert site.positions.tolist() == list(range(8))
        assert site.hidden[:, 0].tolist() == [site.layer + i for i in range(8)]
        assert site.topk_ids is not None and site.topk_ids.tolist() == [[0, 1]] * 8
        assert site.provenance["is"] == ABOUT["is"]


def test_the_backend_records_nothing_of_a_pass_that_fails(tiny_engine, tmp_path):
    engine = Engine()
    with tiny_engine(engine, tmp_path / "tiny", provenance=ABOUT, layers=[1]):
        with pytest.raises(ValueError, match="below 0"):
            engine(torch.tensor([-1]))
        engine(torch.arange(3))
    (site,) = nv.load_activations(tmp_path / "tiny")
    assert site.positions.tolist() == [0, 1, 2]


def test_the_backend_leaves_the_engine_as_it_was(tiny_engine, tmp_path):
    engine = Engine()
    with tiny_engine(engine, tmp_path / "tiny", provenance=ABOUT):
        pass
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in engine.modules())


def test_the_backend_imports_what_capture_may(tmp_path, monkeypatch):
    folder = tmp_path / "capture"
    folder.mkdir()
    (folder / "tiny_engine.py").write_text(BACKEND, encoding="utf-8")
    monkeypatch.setattr(test_imports, "PACKAGE", tmp_path)
    test_imports.test_kernels_and_records_stand_alone(folder / "tiny_engine.py")


# ---- A figure ----

FIGURE, FIGURE_TEST, CELL = examples("Add a figure")


@pytest.fixture
def flushed_by_layer(monkeypatch):
    found = define(FIGURE, layers, "flushed_by_layer")
    monkeypatch.setattr(layers, "flushed_by_layer", found, raising=False)
    monkeypatch.setattr(plots, "flushed_by_layer", found, raising=False)
    return found


def test_the_test_of_the_figure_passes(flushed_by_layer):
    define(FIGURE_TEST, test_plots_layers, "test_flushed_shares_are_a_line_a_recipe")()


def test_the_cell_of_the_figure_runs(flushed_by_layer):
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    exec(CELL, {"nv": nv, "pd": pd})
    assert len(plt.gca().get_lines()) == 2
    plt.close("all")
    plt.switch_backend(backend)


# ---- The page itself ----


def test_every_path_that_the_page_names_is_there():
    given = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    given += re.findall(r"(?<![\w/])(?:nvfp4lab|tests|notebooks|data)/[\w./]*\w", PAGE)
    assert len(given) > 15
    assert [path for path in given if not (ROOT / path).exists()] == []
