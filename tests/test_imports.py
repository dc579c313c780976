"""The one-way order of imports inside nvfp4lab, and what `import nvfp4lab` may load.

Read from the source with ast, so a module is held to the order before anything imports it. A new
module gets its place in LAYERS; move one only when its place in the design moves.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nvfp4lab"

# A module imports from earlier layers only, never from its own. A folder counts as one module.
LAYERS = (
    {"files", "checked_json", "checks"},
    {"kernels", "records", "runs", "publish", "formats", "threads"},
    {"capture", "controls", "rules", "layouts"},
    {"catalogue"},
    {"quantized"},
    {"outer", "statistics"},
    {"blocks"},
    {"lookup"},
    {"codec"},
    {"contract"},
    {"staging"},
    {"errors"},
    {"sweeps", "theory", "diagnose", "experts", "benchmarks"},
    {"plots"},
    {"report"},
    {"cli"},
)
# The kernels are an implementation of their own, and a record knows nothing of recipes.
MAY_IMPORT = {
    "kernels": set(),
    "files": set(),
    "checked_json": set(),
    "checks": set(),
    "records": {"files", "checked_json", "checks"},
    "capture": {"files", "records", "checked_json"},
    "controls": {"records", "checks"},
    "runs": {"files"},
    "publish": set(),
}
DRAWS = {"plots"}

HEAVY = {"triton", "scipy", "seaborn", "matplotlib", "pandas", "numpy.testing", "IPython"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that the file names in an import, wherever it stands, as absolute names."""
    package = ["nvfp4lab", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            found.add(base)
            if base == "nvfp4lab":  # `from nvfp4lab import layouts`
                found |= {f"nvfp4lab.{alias.name}" for alias in node.names}
    return found


def siblings_of(path: Path) -> set[str]:
    """The other modules of nvfp4lab that the file imports from."""
    names = {name.split(".")[1] for name in imports_of(path) if name.startswith("nvfp4lab.")}
    return {name for name in names if name in MODULES} - {module_of(path)}


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


# __init__ names them all; test_importing_the_package_is_light holds it.
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
MODULES = {module_of(path) for path in SOURCES}
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))


def new_modules(statement: str, after: str = "pass") -> set[str]:
    """What `statement` adds to sys.modules in a fresh interpreter that has run `after`."""
    code = (
        f"import json, sys\n{after}\nbefore = set(sys.modules)\n{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy_among(modules: set[str], heavy: set[str]) -> set[str]:
    return {name for name in modules if any(f"{name}.".startswith(f"{h}.") for h in heavy)}


def test_every_module_has_a_layer():
    assert MODULES - set().union(*LAYERS) == set()


@each_source
def test_imports_point_one_way(path):
    later = {name for name in siblings_of(path) if layer_of(name) >= layer_of(module_of(path))}
    assert not later, f"{module_of(path)} imports {sorted(later)}, which stand no earlier than it"


@each_source
def test_kernels_and_records_stand_alone(path):
    allowed = MAY_IMPORT.get(module_of(path), MODULES)
    assert siblings_of(path) <= allowed


@each_source
def test_only_plots_imports_seaborn(path):
    draws = any(name.split(".")[0] == "seaborn" for name in imports_of(path))
    assert not draws or module_of(path) in DRAWS


def test_importing_the_package_is_light():
    """Beyond what torch loads: no Triton, and nothing for statistics, tables or pictures."""
    assert heavy_among(new_modules("import nvfp4lab", after="import torch"), HEAVY) == set()


def test_the_command_line_starts_light():
    heavy = HEAVY | {"torch", "nbconvert", "nbclient", "jupyter_client", "nbformat"}
    package = new_modules("import nvfp4lab")
    assert heavy_among(new_modules("import nvfp4lab.cli") - package, heavy) == set()


def test_relative_imports_are_read_as_absolute(tmp_path, monkeypatch):
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "x.py"
    source = "from . import seed\nfrom ..codec import quantize\nfrom nvfp4lab import rules\n"
    path.write_text(source)
    assert imports_of(path) == {"nvfp4lab.kernels", "nvfp4lab.codec", "nvfp4lab", "nvfp4lab.rules"}


def test_every_public_name_is_found_and_no_module_has_its_name():
    import nvfp4lab

    for name in nvfp4lab.__all__:
        assert getattr(nvfp4lab, name) is not None
    assert set(nvfp4lab.__all__).isdisjoint(MODULES)


def test_type_checkers_see_the_names_that_are_there():
    import nvfp4lab

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: (node.module or "").removeprefix("nvfp4lab.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == nvfp4lab._HOME


def test_an_unknown_name_is_an_attribute_error():
    import nvfp4lab

    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        nvfp4lab.quantise  # noqa: B018
