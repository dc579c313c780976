"""Records: what is written is read, and nothing damaged, altered or unexplained is ever read."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nvfp4lab as nv
from nvfp4lab.records import (
    DTYPES,
    METADATA_KEY,
    data_folder,
    file_sha256,
    save_activations,
)

sys.path.insert(0, str(data_folder()))


def record(**changes) -> nv.Activations:
    generator = torch.Generator().manual_seed(0)
    plain = nv.Activations(
        hidden=torch.randn(4, 32, generator=generator).bfloat16(),
        positions=torch.arange(4),
        layer=3,
        site="mlp_input",
        provenance={"is": "random numbers"},
        topk_ids=torch.tensor([[0, 1]] * 4),
        topk_weights=torch.rand(4, 2, generator=generator),
    )
    return replace(plain, **changes)


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    want = record()
    save_activations(tmp_path / "a.safetensors", want)
    (got,) = nv.load_activations(tmp_path / "a.safetensors")
    assert got.label == "layer03.mlp_input" and got.provenance == want.provenance
    for name in ("hidden", "positions", "topk_ids", "topk_weights"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_a_dense_record_has_no_routing(tmp_path):
    save_activations(tmp_path / "a.safetensors", record(topk_ids=None, topk_weights=None))
    (got,) = nv.load_activations(tmp_path / "a.safetensors")
    assert got.topk_ids is None and got.topk_weights is None


def test_a_negated_view_is_saved_by_its_values(tmp_path):
    hidden = record().hidden
    negated = torch._neg_view(hidden)  # pyright: ignore[reportPrivateImportUsage]
    save_activations(tmp_path / "a.safetensors", record(hidden=negated))
    (loaded,) = nv.load_activations(tmp_path / "a.safetensors")
    assert loaded.hidden.equal(-hidden)


def test_the_same_record_gives_the_same_bytes(tmp_path):
    digests = {save_activations(tmp_path / f"{i}.safetensors", record()) for i in range(3)}
    assert len(digests) == 1 and file_sha256(tmp_path / "0.safetensors") in digests


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for layer in (2, 0, 1):
        save_activations(tmp_path / f"layer{layer}.safetensors", record(layer=layer))
    assert [a.layer for a in nv.load_activations(tmp_path)] == [0, 1, 2]


def test_a_refused_record_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"expected hidden of dtype torch\.bfloat16"):
        save_activations(tmp_path / "a.safetensors", record(hidden=torch.ones(4, 32)))
    assert not list(tmp_path.iterdir())


WRONG_PARTS = {  # the part: what was expected, what was found
    "hidden dtype": (
        {"hidden": torch.ones(4, 32)},
        "expected hidden of dtype torch.bfloat16",
        "'hidden': 'torch.float32 (4, 32)'",
    ),
    "hidden shape": (
        {"hidden": torch.ones(32).bfloat16()},
        "expected hidden [T, D] and positions [T]",
        "'hidden': 'torch.bfloat16 (32,)'",
    ),
    "positions dtype": (
        {"positions": torch.arange(4).int()},
        "expected positions of dtype torch.int64",
        "'positions': 'torch.int32 (4,)'",
    ),
    "positions shape": (
        {"positions": torch.arange(3)},
        "expected hidden [T, D] and positions [T]",
        "'positions': 'torch.int64 (3,)'",
    ),
    "weights without ids": (
        {"topk_ids": None},
        "expected both topk_ids and topk_weights, or neither",
        "'topk_weights': 'torch.float32 (4, 2)'",
    ),
    "ids dtype": (
        {"topk_ids": torch.zeros(4, 2).short()},
        "expected topk_ids of dtype torch.int32 or torch.int64",
        "'topk_ids': 'torch.int16 (4, 2)'",
    ),
    "ids of another token count": (
        {"topk_ids": torch.zeros(3, 2).long(), "topk_weights": torch.ones(3, 2)},
        "expected topk_ids and topk_weights [T, k]",
        "'topk_ids': 'torch.int64 (3, 2)'",
    ),
    "weights of another k": (
        {"topk_weights": torch.ones(4, 3)},
        "expected topk_ids and topk_weights [T, k]",
        "'topk_weights': 'torch.float32 (4, 3)'",
    ),
    "weights dtype": (
        {"topk_weights": torch.ones(4, 2).half()},
        "expected topk_weights of dtype torch.float32",
        "'topk_weights': 'torch.float16 (4, 2)'",
    ),
    "id below -1": (
        {"topk_ids": torch.full((4, 2), -2)},
        "expected expert ids of -1 or more, the smallest is -2",
        "'topk_ids': 'torch.int64 (4, 2)'",
    ),
}


def assert_names(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("part", WRONG_PARTS)
def test_a_record_with_a_wrong_part_is_not_saved(tmp_path, part):
    change, expected, found = WRONG_PARTS[part]
    with pytest.raises(ValueError) as error:
        save_activations(tmp_path / "a.safetensors", record(**change))
    assert_names(error, "a.safetensors", expected, found)


@pytest.mark.parametrize("part", WRONG_PARTS)
def test_a_file_with_a_wrong_part_is_not_loaded(tmp_path, part):
    change, expected, found = WRONG_PARTS[part]
    changed = {name: getattr(record(**change), name) for name in DTYPES}
    content = {name: tensor for name, tensor in changed.items() if tensor is not None}
    about = json.dumps({"layer": 3, "site": "mlp_input", "provenance": {}})
    save_file(content, tmp_path / "a.safetensors", metadata={METADATA_KEY: about})
    with pytest.raises(ValueError) as error:
        nv.load_activations(tmp_path / "a.safetensors")
    assert_names(error, "a.safetensors", expected, found)


def tensors() -> dict[str, torch.Tensor]:
    return {"hidden": torch.ones(2, 16).bfloat16(), "positions": torch.arange(2)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"lacks its metadata: expected the entry 'nvfp4lab', .* found \[\]"),
        ({METADATA_KEY: "{"}, "metadata 'nvfp4lab': expected JSON"),
        ({METADATA_KEY: "[]"}, r"expected an object with layer, site, provenance, found \[\]"),
        (
            {METADATA_KEY: json.dumps({"layer": 1, "site": "a"})},
            "expected an object with layer, site, provenance, found {'layer': 1, 'site': 'a'}",
        ),
        (
            {METADATA_KEY: json.dumps({"layer": "1", "site": "a", "provenance": {}})},
            r"expected a whole number from 0 to 2147483647 at \['layer'\], found '1'",
        ),
    ],
)
def test_a_file_without_its_metadata_is_refused(tmp_path, metadata, message):
    save_file(tensors(), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        nv.load_activations(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("hidden"), "without hidden it is no record"),
        (lambda t: t.update(extra=torch.ones(1)), "no keys but .*, not extra"),
    ],
)
def test_a_file_with_other_keys_is_refused(tmp_path, change, message):
    content = tensors()
    change(content)
    about = json.dumps({"layer": 1, "site": "a", "provenance": {}})
    save_file(content, tmp_path / "a.safetensors", metadata={METADATA_KEY: about})
    with pytest.raises(ValueError, match=message):
        nv.load_activations(tmp_path / "a.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_activations(path, record())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError) as error:
        nv.load_activations(path)
    expected = "a.safetensors is no whole safetensors file: expected a header and every byte"
    assert_names(error, expected, f"found {path.stat().st_size} bytes")


def test_a_pickle_is_not_opened(tmp_path):
    torch.save(tensors(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        nv.load_activations(tmp_path / "a.safetensors")


def test_an_altered_file_is_refused_when_its_sha256_is_known(tmp_path):
    path = tmp_path / "a.safetensors"
    digest = save_activations(path, record())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    nv.load_activations(path)  # a whole file still: nobody asked
    with pytest.raises(ValueError) as error:
        nv.load_activations(path, sha256={"a.safetensors": digest})
    found = f"a.safetensors was altered: its sha256 is {file_sha256(path)}"
    assert_names(error, found, f"expected {digest}")


def test_a_file_that_no_sha256_names_is_refused(tmp_path):
    save_activations(tmp_path / "a.safetensors", record())
    with pytest.raises(ValueError, match=r"no sha256 was given for a.safetensors"):
        nv.load_activations(tmp_path, sha256={})


def test_a_folder_that_lacks_a_file_with_a_sha256_is_refused(tmp_path):
    digest = save_activations(tmp_path / "a.safetensors", record())
    with pytest.raises(ValueError, match=r"lacks b.safetensors, whose sha256 was given"):
        nv.load_activations(tmp_path, sha256={"a.safetensors": digest, "b.safetensors": digest})


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no activations at"):
        nv.load_activations(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no record, expected .safetensors files"):
        nv.load_activations(tmp_path)


def test_unknown_set_gets_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown activation set 'smolm2'; did you mean smollm2\?"
    ):
        nv.activations("smolm2")


def test_unknown_set_with_no_near_name_gets_the_names():
    with pytest.raises(ValueError, match=r"set 'gauss'; expected one of smollm2[^;]*$"):
        nv.activations("gauss")


@pytest.fixture
def shipped_copy(tmp_path, monkeypatch) -> Path:
    """The data folder copied, so that a test may damage it."""
    import shutil

    shutil.copytree(data_folder(), tmp_path / "data")
    monkeypatch.setattr("nvfp4lab.records.data_folder", lambda: tmp_path / "data")
    return tmp_path / "data"


def test_one_flipped_bit_in_a_shipped_file_is_refused(shipped_copy):
    path = shipped_copy / "smollm2" / "layer05.mlp_input.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    want = file_sha256(path)
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        nv.activations("smollm2")
    found = f"layer05.mlp_input.safetensors was altered: its sha256 is {file_sha256(path)}"
    assert_names(error, found, f"expected {want}")


def test_a_missing_shipped_file_is_refused(shipped_copy):
    (shipped_copy / "smollm2" / "layer29.mlp_input.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layer29.mlp_input.safetensors is missing"):
        nv.activations("smollm2")


def test_shipped_sites_and_shapes():
    got = [(a.layer, a.site, tuple(a.hidden.shape)) for a in nv.activations("smollm2")]
    sites = (("mlp_input", 576), ("down_proj_input", 1536))
    assert sorted(got) == sorted(
        (layer, site, (256, width)) for layer in (0, 5, 9, 15, 21, 29) for site, width in sites
    )


def test_every_entry_of_the_manifest_describes_its_file():
    for name, about in json.loads((data_folder() / "manifest.json").read_text()).items():
        for entry, site in zip(about["files"], nv.activations(name), strict=True):
            path = data_folder() / entry["path"]
            tokens, width = site.hidden.shape
            assert entry == {
                "path": f"{name}/{site.label}.safetensors",
                "sha256": file_sha256(path),
                "bytes": path.stat().st_size,
                "layer": site.layer,
                "site": site.site,
                "tokens": tokens,
                "width": width,
            }


def test_the_shipped_text_is_the_one_that_ran():
    about = json.loads((data_folder() / "manifest.json").read_text())["smollm2"]
    assert file_sha256(data_folder() / "smollm2" / "text.txt") == about["text_sha256"]


def test_the_shipped_text_comes_with_its_licence():
    licence = (data_folder() / "smollm2" / "text.LICENSE.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence


def about_of(entry: dict) -> dict:
    """What a set's entry of the manifest says beside its files."""
    return {k: v for k, v in entry.items() if k not in ("files", "weights")}


def test_every_shipped_file_is_in_the_manifest_and_says_what_it_is_not():
    sets = json.loads((data_folder() / "manifest.json").read_text())
    listed = {f["path"] for s in sets.values() for f in [*s["files"], s["weights"]]}
    found = {str(p.relative_to(data_folder())) for p in data_folder().rglob("*.safetensors")}
    assert listed == found
    for name in sets:
        for site in nv.activations(name):
            assert "this is not DeepSeek V4" in site.provenance["is"]
            assert site.provenance == about_of(sets[name])


def test_the_data_cards_tables_are_those_of_the_files():
    import make_card

    card = (data_folder() / "README.md").read_text()
    assert {match["name"] for match in make_card.TABLE.finditer(card)} == set(make_card.TABLES)
    assert card == make_card.renewed(card), "run: python data/make_card.py"


def test_the_data_stays_small():
    size = sum(path.stat().st_size for path in data_folder().rglob("*") if path.is_file())
    assert size < 32_000_000


# expert weights ---------------------------------------------------------------------------------


def test_the_shipped_experts_are_those_of_the_manifest():
    for name, about in json.loads((data_folder() / "manifest.json").read_text()).items():
        weights, entry = nv.expert_weights(name), about["weights"]
        path = data_folder() / entry["path"]
        assert (file_sha256(path), path.stat().st_size) == (entry["sha256"], entry["bytes"])
        assert list(weights.gate_up_proj.shape) == entry["gate_up_proj"]
        assert list(weights.down_proj.shape) == entry["down_proj"]
        assert (weights.layer, weights.provenance) == (entry["layer"], about_of(about))
        assert weights.gate_up_proj.dtype == weights.down_proj.dtype == torch.bfloat16


def test_smollm2s_mlp_turns_its_input_into_its_second_input():
    """What down_proj takes is silu(gate x) * (up x), but for the BF16 of x, weights and result."""
    sites = {site.label: site.hidden.float() for site in nv.activations("smollm2")}
    gate, up = nv.expert_weights("smollm2").gate_up_proj[0].float().chunk(2)
    x, want = sites["layer00.mlp_input"], sites["layer00.down_proj_input"]
    got = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    assert (got - want).norm() / want.norm() < 0.01


def test_altered_experts_are_refused(shipped_copy):
    path = shipped_copy / "smollm2" / "layer00.experts.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"layer00.experts.safetensors was altered"):
        nv.expert_weights("smollm2")


# reading part of it -----------------------------------------------------------------------------


def test_rows_of_a_record_are_those_rows():
    part = record().rows(1, 3)
    assert len(part) == 2
    assert part.hidden.equal(record().hidden[1:3]) and part.positions.tolist() == [1, 2]
    assert part.topk_ids is not None and part.topk_ids.shape == (2, 2)


def test_a_record_is_shown_in_a_line():
    assert repr(record()) == (
        "Activations(layer03.mlp_input, hidden (4, 32), top 2: random numbers)"
    )


MAPPED = """
import sys, nvfp4lab as nv
def anonymous():  # kB that are the process's own, and not the file's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
def mapped():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))
nv.load_activations
before, file_before = anonymous(), mapped()
(site,) = nv.load_activations(sys.argv[1])
total = site.rows(1000, 1010).hidden.float().sum().item()
print(anonymous() - before, mapped() - file_before, len(site))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_record_is_not_read_until_its_rows_are_used(tmp_path):
    """400 MB on disk; ten rows of it cost a few MB."""
    import subprocess

    tokens = 50_000
    path = tmp_path / "large.safetensors"
    large = replace(
        record(),
        hidden=torch.zeros(tokens, 4096, dtype=torch.bfloat16),
        positions=torch.arange(tokens),
        topk_ids=None,
        topk_weights=None,
    )
    save_activations(path, large)
    done = subprocess.run(
        [sys.executable, "-c", MAPPED, str(path)], capture_output=True, text=True, check=True
    )
    own, file, rows = map(int, done.stdout.split())
    assert path.stat().st_size > 400_000_000 and rows == tokens
    assert own < 20_000 and file < 60_000
