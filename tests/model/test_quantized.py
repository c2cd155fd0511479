"""Quantized checkpoints: experts stay quantized in memory, and equal transformers' dequantized model exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finemoe
from finemoe.errors import CheckpointError, ConfigError, UnsupportedModelError
from finemoe.model.describe import describe
from finemoe.model.quantized import refuse_on_devices
from tests.families.evaluate import answers
from tests.families.examine import least_memory
from tests.quantized import fp8, mxfp4, restored
from tests.tiny import WEIGHTS, configured, edited, experts_modules

STORED: dict[str, Callable[[Path], Path]] = {
    "fp8, a tensor per expert": lambda folder: fp8(folder, "qwen3_moe"),
    "fp8, shared experts and low-rank attention": lambda folder: fp8(folder, "deepseek_v3"),
    "fp8, other names": lambda folder: fp8(folder, "mixtral"),
    "mxfp4": mxfp4,
}


def expert_layers(model: Any) -> list[Any]:
    return [module.finemoe_layer for module in experts_modules(model)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = STORED[kind](tmp_path_factory.mktemp("quantized"))
        return made[kind]

    return make


@pytest.mark.parametrize("kind", STORED)
def test_answers_equal_the_dequantized_model(stored: Callable[[str], Path], kind: str) -> None:
    folder = stored(kind)
    expected = answers(restored(folder).eval())
    for budget in (least_memory(folder, torch.bfloat16), "50%", "all"):
        with finemoe.load(folder, expert_memory=budget, verify=True) as model:
            got = answers(model)
            assert all(torch.equal(got[name], expected[name]) for name in expected), budget
            assert all(layer.accumulator is not None for layer in expert_layers(model))  # not by the reference path


@pytest.mark.parametrize("kind", STORED)
def test_the_reference_path_answers_the_same(stored: Callable[[str], Path], kind: str) -> None:
    expected = answers(restored(stored(kind)).eval())
    with finemoe.load(stored(kind)) as model:
        for layer in expert_layers(model):
            layer.accumulator = None
        assert torch.equal(answers(model)["prefill"], expected["prefill"])


@pytest.mark.parametrize("items", [1, 1000, 1 << 20])  # dequantized at a time
@pytest.mark.parametrize("kind", STORED)
def test_dequantized_parameters_equal_those_of_the_dequantized_model(
    stored: Callable[[str], Path], kind: str, items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.store.quantization._PART_ITEMS", items)
    references = experts_modules(restored(stored(kind)))
    with finemoe.load(stored(kind), expert_memory="all") as model:
        for module, reference in zip(experts_modules(model), references, strict=True):
            layer = module.finemoe_layer
            for expert, slot in layer.serve(range(layer.layout.experts)):
                got = layer.parameters(expert, slot)
                assert set(got) == {name for name, _ in reference.named_parameters(recurse=False)}
                assert all(torch.equal(got[name], getattr(reference, name)[expert]) for name in got)


@pytest.mark.parametrize("kind", STORED)
def test_experts_stay_quantized_in_every_tier(stored: Callable[[str], Path], kind: str) -> None:
    folder = stored(kind)
    tensors = load_file(folder / WEIGHTS)
    names = [name for name in tensors if ".experts." in name]
    with finemoe.load(folder, expert_memory="all") as model:
        expert_index, stats = model.finemoe.expert_index, model.finemoe.stats()
        assert expert_index.weight_bytes == sum(tensors[name].nbytes for name in names)
        assert stats.expert_memory_bytes == expert_index.experts * expert_index.slot_bytes
        answers(model)
        stored_bytes = max(layout.length_bytes for layout in expert_index.layouts)
        assert stored_bytes <= expert_index.slot_bytes < stored_bytes + 4096
    assert describe(str(folder)).expert_index.weight_bytes == expert_index.weight_bytes


def test_layers_left_unquantized_are_exact(tmp_path: Path) -> None:
    folder = fp8(tmp_path, "qwen3_moe", keep=lambda name: ".layers.1." in name)
    expected = answers(restored(folder).eval())
    with finemoe.load(folder) as model:
        assert [len(layer.layout.quantized) for layer in expert_layers(model)] == [2, 0, 2, 2]
        assert all(torch.equal(value, expected[name]) for name, value in answers(model).items())


def per_matrix(scale: torch.Tensor) -> torch.Tensor:
    return scale.max()


def powers_of_two(scale: torch.Tensor) -> torch.Tensor:
    return scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)


@pytest.mark.parametrize("change", [per_matrix, powers_of_two])
def test_other_scales_are_exact_too(
    stored: Callable[[str], Path], tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A single scale per matrix; scales of eight exponent bits."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name and name.endswith("weight_scale_inv"):
                tensors[name] = change(tensor)

    folder = edited(stored("fp8, a tensor per expert"), tmp_path, edit)
    expected = answers(restored(folder).eval())
    with finemoe.load(folder) as model:
        assert all(layer.layout.quantized for layer in expert_layers(model))
        assert all(torch.equal(value, expected[name]) for name, value in answers(model).items())


def test_scales_that_are_missing_or_do_not_fit_are_named(stored: Callable[[str], Path], tmp_path: Path) -> None:
    folder = stored("fp8, a tensor per expert")
    scale = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[scale]

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.1.mlp.experts." in name and name.endswith("up_proj.weight_scale_inv"):
                tensors[name] = tensor[:, :5]

    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.experts.*16 tensors weight, but 15 weight_scale"):
        finemoe.load(edited(folder, tmp_path / "dropped", drop))
    with pytest.raises(UnsupportedModelError, match=r"weight_scale_inv differ in row length"):
        finemoe.load(edited(folder, tmp_path / "cut", cut))


@pytest.mark.parametrize("kind", STORED)
def test_another_dtype_is_exact_or_refused(stored: Callable[[str], Path], kind: str) -> None:
    """Whether transformers' dequantized model runs in it depends on the release."""
    try:
        expected = answers(restored(stored(kind), "float32").eval())
    except RuntimeError:  # matrices of two dtypes
        expected = None
    try:
        model = finemoe.load(stored(kind), dtype="float32")
    except ConfigError as refusal:
        assert str(refusal).startswith("--dtype: this quantized checkpoint is restored in bfloat16 only")  # noqa: PT017
        assert expected is None
        return
    got = answers(model)
    model.close()
    assert expected is None or all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("method", ["gptq", "awq", "unheard-of"])
def test_an_unsupported_quantization_method_is_refused(
    stored: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    folder = configured(stored("mxfp4"), tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=rf"is quantized \({method}\), which transformers can't dequantize"):
        finemoe.load(folder)


def test_the_missing_library_is_named(stored: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'finemoe\[quantized\]'"):
        finemoe.load(stored("fp8, other names"))
    finemoe.load(stored("mxfp4")).close()


def test_quantized_experts_are_refused_on_devices(stored: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"^--device: experts stored as mxfp4 .* give --device cpu"):
        refuse_on_devices(describe(str(stored("mxfp4"))).expert_index)
