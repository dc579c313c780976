"""pyproject.toml, environment.yml, constraints.txt and the wheel agree with each other."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUPS = {"run": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DECLARED = [Requirement(line) for lines in GROUPS.values() for line in lines]

TIMES_PEERS = ROOT / "nvfp4lab" / "benchmarks" / "cpu.py"  # those that are installed

CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name -> PyPI's


def demands(requirements: list[Requirement]) -> dict[str, tuple[str, str]]:
    """name -> (versions, marker); extras are pip's way of choosing parts, conda has none."""
    return {canonicalize_name(r.name): (str(r.specifier), str(r.marker)) for r in requirements}


def conda_environment() -> tuple[str, list[Requirement]]:
    """(the python specifier, every other requirement under its PyPI name) of environment.yml."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    from_pip = next(line["pip"] for line in lines if isinstance(line, dict))
    plain = [line for line in lines if isinstance(line, str) and line != "pip"]
    python = next(line for line in plain if line.startswith("python>"))
    names = [Requirement(line) for line in plain if line != python]
    for requirement in names:
        requirement.name = CONDA_NAMES.get(requirement.name, requirement.name)
    names += [Requirement(line) for line in from_pip if not line.startswith("-")]
    return python.removeprefix("python"), names


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            pinned = re.fullmatch(r"([\w.-]+)==([\w.+]+)", line)
            assert pinned, f"not a pin: {line}"
            found[canonicalize_name(pinned[1])] = Version(pinned[2])
    return found


def imported_packages(folder: str) -> set[str]:
    """The top-level modules outside the standard library that a folder's sources import."""
    names, own = set(), {"nvfp4lab", *(path.stem for path in (ROOT / "data").glob("*.py"))}
    for path in (ROOT / folder).rglob("*.py"):
        if path.parent.name == "conformance" or path == TIMES_PEERS:  # test_the_peers_are_pinned
            continue
        own |= {path.stem, path.parent.name}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.split(".")[0])
    return names - own - set(sys.stdlib_module_names)


def test_the_peers_are_pinned_as_conformance_json_says():
    lines = (ROOT / "requirements-peers.txt").read_text(encoding="utf-8").splitlines()
    install = (ROOT / "tests" / "conformance" / "install.sh").read_text(encoding="utf-8")
    pins = {line.replace("[cpu]", "") for line in lines if "==" in line}
    pins |= set(re.findall(r"(?:fouroversix|llama-cpp-python)==[\d.]+", install))
    table = json.loads((ROOT / "data" / "conformance.json").read_text(encoding="utf-8"))
    ran = [e["peer"] for e in table["recipes"].values() if "cases" in e]
    ran.append(table["recipes"]["llama.cpp"]["gguf"]["peer"])
    assert {peer.split(" of ")[-1].replace(" ", "==") for peer in ran} == pins


def test_conda_asks_for_what_pyproject_asks_for():
    _, requirements = conda_environment()
    assert demands(requirements) == demands(DECLARED)


def test_conda_asks_for_the_same_python():
    assert conda_environment()[0] == PROJECT["requires-python"]


def test_conda_installs_the_checkout_itself():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert "--editable ." in next(line["pip"] for line in lines if isinstance(line, dict))


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda r: r.name)
def test_every_requirement_is_pinned_within_its_range(requirement):
    pinned = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


def test_pins_name_no_build_of_one_platform():
    assert [name for name, version in pins().items() if version.local] == []


def test_pins_take_every_python_that_the_project_takes():
    """Debian 12 has 3.11.2; a pin that asks for 3.11.5 breaks `make` there."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    too_new = {}
    for name, pinned in pins().items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of the platform's own
        # get_all: where dask has imported importlib_metadata, [...] raises for what is not there.
        asked = ",".join(installed.metadata.get_all("Requires-Python") or ())
        if installed.version == str(pinned) and asked and oldest not in SpecifierSet(asked):
            too_new[name] = asked
    assert too_new == {}


def test_triton_is_required_on_linux_only():
    (triton,) = [r for r in DECLARED if r.name == "triton"]
    assert triton.marker is not None
    platforms = ("linux", "darwin", "win32")
    asked = [p for p in platforms if triton.marker.evaluate({"sys_platform": p})]
    assert asked == ["linux"]


@pytest.mark.parametrize(
    ("folder", "groups"), [("nvfp4lab", ["run", "capture", "dask"]), ("tests", ["run", "test"])]
)
def test_every_import_is_declared(folder, groups):
    declared = {canonicalize_name(Requirement(line).name) for g in groups for line in GROUPS[g]}
    providers = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in imported_packages(folder)
        if not declared & {canonicalize_name(dist) for dist in providers.get(name, [name])}
    }
    assert missing == set()


def test_the_command_exists():
    module, name = PROJECT["scripts"]["nvfp4lab"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling (the test extra)")
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("nvfp4lab-*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_carries_the_templates(wheel):
    templates = {str(p.relative_to(ROOT)) for p in (ROOT / "nvfp4lab/templates").rglob("*.*")}
    assert templates <= wheel


def test_wheel_carries_the_shipped_activations(wheel):
    data = ROOT / "data"
    files = [p for p in data.rglob("*") if p.suffix in (".safetensors", ".json")]
    shipped = {p.relative_to(data).as_posix() for p in files if "benchmarks" not in p.parts}
    assert shipped
    assert {f"nvfp4lab/_data/{name}" for name in shipped} <= wheel


def test_wheel_carries_the_reports_notebook_and_no_other(wheel):
    assert [n for n in wheel if n.endswith(".ipynb")] == ["nvfp4lab/_notebooks/report.ipynb"]


def test_wheel_carries_nothing_else(wheel):
    folders = {name.split("/")[0] for name in wheel}
    assert {f for f in folders if not f.endswith(".dist-info")} == {"nvfp4lab"}
    scripts = [n for n in wheel if n.startswith("nvfp4lab/_data/") and n.endswith(".py")]
    assert scripts == []
