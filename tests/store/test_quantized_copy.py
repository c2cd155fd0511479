"""`--expert-dtype`: the copy is written once, has the quantized weights, and is reported as lossy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

import finemoe
from finemoe.cli import main
from finemoe.errors import ConfigError
from finemoe.model.describe import describe
from finemoe.store.quantization import SCHEMES, Scheme
from tests.families.catalogue import catalogue
from tests.families.evaluate import answers
from tests.quantized import fp8
from tests.tiny import Make, eager, experts_modules

pytest.importorskip("torchao")

FAMILIES = ("mixtral", "gpt_oss", "inkling2_text")  # plain, transposed with biases, interleaved
KNOWN = catalogue()  # to this transformers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rounded(folder: Path, scheme: Scheme) -> Any:
    """The complete model in memory, its experts' matrices quantized and dequantized one by one."""
    model = eager(folder)
    for module in experts_modules(model):
        for _, parameter in module.named_parameters(recurse=False):
            for expert in parameter.data:
                if scheme.pieces(tuple(expert.shape)) is not None:
                    pieces = scheme.quantize(expert)
                    expert.copy_(scheme.dequantize_as(tuple(expert.shape))(pieces, expert.dtype))
    return model.eval()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family in KNOWN])
def test_answers_are_those_of_the_dequantized_weights(tiny: Make, family: str, name: Any) -> None:
    folder = tiny(family, "bfloat16")
    expected, exact = answers(rounded(folder, SCHEMES[name])), answers(eager(folder))
    for budget in ("50%", "all"):
        with finemoe.load(folder, expert_dtype=name, expert_memory=budget, verify=True) as model:
            got = answers(model)
            stats = model.finemoe.stats()
            assert name in stats.expert_dtype
            assert stats.lossy
            assert stats.expert_memory_bytes == stats.slots * model.finemoe.expert_index.slot_bytes
        assert all(torch.equal(got[part], expected[part]) for part in expected)
    assert not torch.equal(exact["prefill"], expected["prefill"])


def test_the_copy_is_written_once_and_is_smaller(tiny: Make, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("mixtral", "bfloat16")
    before = describe(str(folder)).expert_index.weight_bytes
    finemoe.load(folder, expert_dtype="int4").close()
    files = sorted(cache.rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setattr(Scheme, "quantize", None)  # would fail
    with finemoe.load(folder, expert_dtype="int4") as model:
        assert model.finemoe.expert_index.weight_bytes < 0.4 * before
        assert (
            describe(str(folder), expert_dtype="int4").expert_index.weight_bytes
            == model.finemoe.expert_index.weight_bytes
        )
    assert [file.stat().st_mtime_ns for file in files] == times
    assert not list(cache.rglob("*.part"))
    with safe_open(files[0], "pt") as opened:  # any reader of the format can open it
        assert opened.get_tensor("experts").shape[0] == 8


def test_an_interrupted_conversion_resumes(tiny: Make, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("mixtral", "bfloat16")
    quantize, calls = Scheme.quantize, []

    def interrupted(scheme: Scheme, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        if len(calls) == 20:  # in the second layer: one has 8 experts of two matrices
            raise KeyboardInterrupt
        return quantize(scheme, weights)

    monkeypatch.setattr(Scheme, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finemoe.load(folder, expert_dtype="int8")
    assert [file.name for file in cache.rglob("layer-*")] == ["layer-00000.safetensors"]
    finemoe.load(folder, expert_dtype="int8").close()
    assert len(calls) == 20 + 3 * 16
    cut = next(cache.rglob("layer-00002.safetensors"))
    os.truncate(cut, cut.stat().st_size - 1)
    finemoe.load(folder, expert_dtype="int8").close()
    assert len(calls) == 20 + 4 * 16


def test_other_weights_in_the_same_shapes_have_another_copy(tiny: Make, cache: Path, tmp_path: Path) -> None:
    folder = tiny("mixtral", "bfloat16")
    finemoe.load(folder, expert_dtype="int8").close()
    finemoe.load(shutil.copytree(folder, tmp_path / "tuned"), expert_dtype="int8").close()
    assert len(list((cache / "experts").iterdir())) == 2


def test_a_full_disk_is_noticed_before_anything_is_written(
    tiny: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match=r"^--expert-dtype: the int8 copy.*10 B are free.*FINEMOE_CACHE"):
        finemoe.load(tiny("mixtral", "bfloat16"), expert_dtype="int8")
    assert not list(cache.rglob("layer-*"))


def test_an_unwritable_cache_folder_is_named(tiny: Make, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(
        ConfigError, match=r"^--expert-dtype: .*can't be written to \(.*\); point FINEMOE_CACHE elsewhere"
    ):
        finemoe.load(tiny("mixtral", "bfloat16"), expert_dtype="int8")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = fp8(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match=r"^--expert-dtype: this checkpoint's experts are stored as fp8 already"):
        finemoe.load(folder, expert_dtype="int8")


def test_an_unknown_dtype_is_refused(tiny: Make) -> None:
    with pytest.raises(ConfigError, match=r"^--expert-dtype: 'int3' is not one of stored, int8, int4"):
        finemoe.load(tiny("mixtral"), expert_dtype="int3")


def test_inspect_reports_a_lossy_copy(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny("mixtral", "bfloat16"))
    assert main(["inspect", "--model", folder, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["inspect", "--model", folder, "--expert-dtype", "int8", "--json"]) == 0
    lossy = json.loads(capsys.readouterr().out)
    assert (plain["expert_dtype"], plain["lossy"], lossy["expert_dtype"], lossy["lossy"]) == (
        "bfloat16", False, "int8", True
    )  # fmt: skip
    assert lossy["expert_bytes"] < 0.7 * plain["expert_bytes"]
    assert main(["inspect", "--model", folder, "--expert-dtype", "int8"]) == 0
    assert "stored as int8 (lossy copy: --expert-dtype)" in capsys.readouterr().out
