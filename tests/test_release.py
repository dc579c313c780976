"""CHANGELOG.md and CITATION.cff say of the version that is here what is so."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import nvfp4lab as nv
from nvfp4lab import cli, contract

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

COMMANDS = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
RELEASES = re.findall(r"^## \[([\d.]+)\] - (\S+)$", CHANGELOG, re.MULTILINE)
NEWEST = CHANGELOG.partition("\n## [")[2].partition("\n## [")[0]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

# https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema-guide.md
REQUIRED = {"authors", "cff-version", "message", "title"}
ALLOWED = REQUIRED | {
    *("abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "preferred-citation", "references", "repository"),
    *("repository-artifact", "repository-code", "type", "url", "version"),
}


def test_the_newest_release_is_the_version_that_is_here():
    assert RELEASES[0][0] == nv.__version__


def test_every_heading_of_a_release_has_a_version_and_a_day_and_the_newest_comes_first():
    assert len(RELEASES) == len(re.findall(r"^## ", CHANGELOG, re.MULTILINE))
    days = [datetime.date.fromisoformat(day) for _, day in RELEASES]
    assert days == sorted(days, reverse=True)


def test_changes_are_of_the_kinds_that_keep_a_changelog_has():
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)) <= KINDS


def test_the_newest_release_names_only_what_there_is():
    known = {*nv.__all__, *nv._MODULES, *nv.recipes(), *COMMANDS}
    named = {name.removeprefix("nvfp4lab ") for name in re.findall(r"`([^`]+)`", NEWEST)}
    assert named - known == set()


@pytest.mark.parametrize("listed", ["Staging", "Commands"])
def test_a_list_that_reads_as_whole_is_whole(listed):
    (item,) = re.findall(rf"^- \*\*{listed}\*\*(.*?)(?=^- |\Z)", NEWEST, re.MULTILINE | re.DOTALL)
    named = [name.removeprefix("nvfp4lab ") for name in re.findall(r"`([^`]+)`", item)]
    there = {"Staging": ["stage", "stage_mega_moe_inputs", *contract.STAGEABLE]}
    assert named == there.get(listed, COMMANDS)


def test_the_citation_has_the_keys_of_cff_1_2_0():
    assert CITATION["cff-version"] == "1.2.0"
    assert REQUIRED <= CITATION.keys() <= ALLOWED


def test_the_citation_is_of_this_version_and_its_day():
    assert (CITATION["version"], CITATION["date-released"].isoformat()) == RELEASES[0]


def test_the_citation_says_what_pyproject_says():
    same = ("license", "keywords")
    assert {key: CITATION[key] for key in same} == {key: PROJECT[key] for key in same}
    assert (CITATION["title"], CITATION["type"]) == (PROJECT["name"], "software")


def test_the_authors_are_one_entity():
    """An entity has a name, a person family-names; nobody's name or address is made up."""
    assert CITATION["authors"] == [{"name": "nvfp4lab contributors"}]
