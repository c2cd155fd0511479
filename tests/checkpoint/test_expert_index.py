"""The expert index: gathered bytes are the tensors that transformers loads, for every checkpoint layout."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import finemoe
from finemoe.checkpoint import locate, read_headers
from finemoe.errors import CheckpointError, UnsupportedModelError
from finemoe.types import ExpertId
from tests.tiny import WEIGHTS, Make, answer, eager, edited, experts_modules

LAYOUTS = {
    "one tensor per expert and matrix": ("mixtral", {}),
    "the same in many shards": ("mixtral", {"max_shard_size": "40KB"}),
    "fused, with biases": ("gpt_oss", {}),
    "fused, two matrices in one": ("granitemoe", {}),
    "gate and up in alternate rows": ("inkling2_text", {}),
    "two kinds of experts in one list": ("ernie4_5_vl_moe", {}),
    "no gate": ("nemotron_h", {}),
    "prefix of another base model": ("phimoe", {}),
}
Tensors = dict[str, torch.Tensor]


def gathered_equals_loaded(folder: Path, loaded: Path | None = None) -> None:
    reference = experts_modules(eager(loaded or folder))
    with finemoe.load(folder, expert_memory="all") as model:
        offloaded = experts_modules(model)
        assert len(offloaded) == len(reference) > 0
        for module, expected in zip(offloaded, reference, strict=True):
            handle = module.finemoe_layer
            assert {field.name for field in handle.layout.fields} == {
                n for n, p in expected.named_parameters(recurse=False)
            }
            for expert, slot in handle.serve(range(handle.layout.experts)):
                for name, parameter in handle.parameters(expert, slot).items():
                    assert torch.equal(parameter, getattr(expected, name)[expert]), (name, expert)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_bytes_are_the_loaded_tensors(tiny: Make, layout: str, dtype: str) -> None:
    family, options = LAYOUTS[layout]
    gathered_equals_loaded(tiny(family, dtype, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_parameters_keep_their_files_offset_within_a_page(
    tiny: Make, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.checkpoint.expert_index.PLACED_BYTES", 1)
    family, options = LAYOUTS[layout]
    folder = tiny(family, "bfloat16", **options)
    gathered_equals_loaded(folder)
    with finemoe.load(folder) as model:
        expert_index = model.finemoe.expert_index
        byte_ranges = [
            each for at in range(expert_index.layouts[0].experts) for each in expert_index.byte_ranges(ExpertId(0, at))
        ]
        placed = [each for each in byte_ranges if (each.file_offset_bytes - each.slot_offset_bytes) % 4096 == 0]
        assert len(placed) >= len(byte_ranges) / 2


@pytest.mark.parametrize("placed_bytes", [1, 1 << 30], ids=["large", "small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_parameters_have_the_alignment_of_the_stacked_tensor(
    tiny: Make, layout: str, placed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some CPUs MKL's order of summation depends on the alignment of a float32 matrix."""
    monkeypatch.setattr("finemoe.checkpoint.expert_index.PLACED_BYTES", placed_bytes)
    family, options = LAYOUTS[layout]
    with finemoe.load(tiny(family, "float32", **options)) as model:
        for module in experts_modules(model):
            handle = module.finemoe_layer
            for expert, slot in handle.serve(range(handle.layout.experts)):
                for parameter in handle.parameters(expert, slot).values():
                    assert (parameter.data_ptr() - expert * parameter.nbytes) % 64 == 0


def transpose_experts(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor.transpose(1, 2)


def test_a_checkpoint_with_transposed_matrices_is_supported(tiny: Make, tmp_path: Path) -> None:
    original = tiny("qwen3_vl_moe")
    folder = edited(original, tmp_path, transpose_experts)
    gathered_equals_loaded(folder, original)
    with finemoe.load(folder) as model:
        fields = experts_modules(model)[0].finemoe_layer.layout.fields
        assert all(field.transposed for field in fields)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "inkling2_text"])
def test_an_experts_byte_ranges_fill_its_slot_and_never_overlap(tiny: Make, family: str) -> None:
    folder = tiny(family)
    files = locate(str(folder)).files
    with finemoe.load(folder) as model:
        expert_index = model.finemoe.expert_index
        taken: dict[int, list[tuple[int, int]]] = {}
        for layer, layout in enumerate(expert_index.layouts):
            for expert in range(layout.experts):
                byte_ranges = expert_index.byte_ranges(ExpertId(layer, expert))
                spans = sorted((r.slot_offset_bytes, r.slot_offset_bytes + r.length_bytes) for r in byte_ranges)
                assert all(end <= start for (_, end), (start, _) in pairwise(spans))
                assert sum(r.length_bytes for r in byte_ranges) == layout.weight_bytes
                assert spans[-1][1] <= layout.length_bytes <= expert_index.slot_bytes
                for each in byte_ranges:
                    end = each.file_offset_bytes + each.length_bytes
                    assert end <= files[each.file].stat().st_size
                    taken.setdefault(each.file, []).append((each.file_offset_bytes, end))
        for spans in taken.values():  # no byte of the checkpoint belongs to two experts
            spans.sort()
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert sum(end - start for spans in taken.values() for start, end in spans) == expert_index.weight_bytes


def test_small_parameters_are_aligned_to_64_bytes(tiny: Make) -> None:
    with finemoe.load(tiny("gpt_oss")) as model:
        expert_index = model.finemoe.expert_index
        assert expert_index.slot_bytes % 64 == 0
        for layout in expert_index.layouts:
            assert all(offset % 64 == 0 for offsets in layout.offsets_bytes for offset in offsets)


def test_the_order_of_tensors_in_the_file_does_not_matter(tiny: Make, tmp_path: Path) -> None:
    def reverse(tensors: Tensors) -> None:
        for position, name in enumerate(sorted(tensors, reverse=True)):
            tensors[f"{position:05d}"] = tensors.pop(name)  # safetensors writes by size, then by name

    original = tiny("mixtral", "bfloat16")
    folder = edited(original, tmp_path, reverse)
    headers = read_headers([folder / WEIGHTS])
    names = sorted(read_headers([original / WEIGHTS]), reverse=True)
    # put the names back, with the data in another order than before
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length]
    for position, name in enumerate(names):
        header = header.replace(f'"{position:05d}"'.encode(), f'"{name}"'.encode())
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert len(headers) == len(names)
    with finemoe.load(folder) as moved, finemoe.load(original) as model:
        assert torch.equal(answer(moved), answer(model))


def drop(pattern: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return edit


def halve(pattern: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if pattern in name]:
            tensors[name] = tensors[name][: len(tensors[name]) // 2]

    return edit


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("mixtral", drop("layers.1.block_sparse_moe.experts.3.w2")),
        ("mixtral", drop("layers.1.block_sparse_moe.experts.7.")),
        ("mixtral", drop("layers.1.block_sparse_moe.experts.")),
        ("mixtral", halve("layers.1.block_sparse_moe.experts.3.w2")),
        ("mixtral", halve("layers.1.block_sparse_moe.experts.3.")),
        ("gpt_oss", drop("layers.1.mlp.experts.down_proj_bias")),
        ("gpt_oss", halve("layers.1.mlp.experts.")),
        ("granitemoe", halve("layers.1.block_sparse_moe.input_linear")),
    ],
    ids=["a matrix", "an expert", "a layer", "a short matrix", "a short expert", "biases", "fewer experts", "fused"],
)
def test_missing_and_misshapen_experts_are_refused(
    tiny: Make, tmp_path: Path, family: str, edit: Callable[[Tensors], None]
) -> None:
    folder = edited(tiny(family), tmp_path, edit)
    with pytest.raises(CheckpointError, match=r"^.*layers\.1\..*$") as caught:
        finemoe.load(folder)
    assert "\n" not in str(caught.value)


def test_experts_of_different_dtypes_are_refused(tiny: Make, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        name = "model.layers.2.block_sparse_moe.experts.5.w1.weight"
        tensors[name] = tensors[name].bfloat16()

    folder = edited(tiny("mixtral"), tmp_path, edit)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.block_sparse_moe\.experts\.\d\.w\d\.weight is stored as BF16"
    ):
        finemoe.load(folder)


def test_experts_of_an_unsupported_dtype_are_refused(tiny: Make, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    folder = edited(tiny("mixtral"), tmp_path, edit)
    with pytest.raises(UnsupportedModelError, match="is stored as F8_E4M3; finemoe offloads experts stored as F32"):
        finemoe.load(folder)


@pytest.mark.parametrize(
    "pattern", ["model.norm.weight", "layers.1.self_attn.q_proj", "layers.1.block_sparse_moe.gate"]
)
def test_a_missing_dense_tensor_is_refused_and_not_initialised(tiny: Make, tmp_path: Path, pattern: str) -> None:
    folder = edited(tiny("mixtral"), tmp_path, drop(pattern))
    with pytest.raises(CheckpointError, match=pattern.rpartition(".")[2]):
        finemoe.load(folder)


def test_a_misshapen_dense_tensor_is_refused(tiny: Make, tmp_path: Path) -> None:
    folder = edited(tiny("mixtral"), tmp_path, halve("layers.1.self_attn.q_proj"))
    with pytest.raises(CheckpointError, match="q_proj"):
        finemoe.load(folder)
