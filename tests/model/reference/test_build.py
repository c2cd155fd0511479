"""The built checkpoint computes the defined mixture; a build is atomic, resumable and verified."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.build import build
from finemoe.model.reference.bundle import Bundle, load_bundle
from finemoe.model.reference.dense import FloatArray
from finemoe.model.reference.shards import is_complete
from tests.model.reference.tiny import SHAPE, ArraySource, dense_weights, write_bundle

IDS = torch.tensor([[1, 5, 9, 200, 17, 33, 8, 100]])


def built(tmp_path: Path, bundle: Bundle, weights: dict[str, FloatArray] | None = None) -> Path:
    work, target = tmp_path / "work", tmp_path / "target"
    work.mkdir()
    build(ArraySource(weights or dense_weights()), bundle, work, target, progress=False)
    return target


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")


def dense_model(weights: dict[str, FloatArray]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab, hidden_size=SHAPE.hidden, intermediate_size=SHAPE.neurons, rms_norm_eps=SHAPE.rms_eps,
        num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def test_experts_with_all_neurons_equal_the_dense_model(tmp_path: Path) -> None:
    weights = {k: v.astype(np.float16).astype(np.float32) if v.ndim == 1 else v for k, v in dense_weights().items()}
    bundle = write_bundle(tmp_path / "b", neurons=SHAPE.neurons, plain=True)
    mixture = load(built(tmp_path, bundle, weights))
    torch.testing.assert_close(logits(mixture), logits(dense_model(weights)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("experts", "top_k", "rank"), [(4, 2, 0), (8, 4, 0), (4, 2, 3)])
def test_the_checkpoint_equals_the_definition(tmp_path: Path, experts: int, top_k: int, rank: int) -> None:
    """The definition: `down @ (c * a)`, with `c` the sum of the selected experts' weights times their scales."""
    weights = dense_weights()
    bundle = write_bundle(tmp_path / "b", experts=experts, top_k=top_k, rank=rank)
    mixture = load(built(tmp_path, bundle, weights))
    expected = dict(weights)
    for layer in range(SHAPE.layers):
        stem = f"model.layers.{layer}"
        expected[f"{stem}.input_layernorm.weight"] = bundle.array("input_norm", layer)
        expected[f"{stem}.post_attention_layernorm.weight"] = bundle.array("post_norm", layer)
        for part in "qkvo":
            name = f"{stem}.self_attn.{part}_proj.weight"
            delta = bundle.delta(part, layer)
            expected[name] = weights[name] if delta is None else weights[name] + delta
    expected["model.norm.weight"] = bundle.array("final_norm")
    dense = dense_model(expected)
    for layer, block in enumerate(dense.model.layers):
        coefficients = torch.zeros(experts, SHAPE.neurons)
        for expert, neurons in enumerate(bundle.neurons(layer)):
            coefficients[expert, neurons] = torch.from_numpy(bundle.array("scales", layer)[expert])
        router = torch.from_numpy(bundle.array("router", layer))

        def forward(x: torch.Tensor, mlp: Any = block.mlp, c: Any = coefficients, r: Any = router) -> torch.Tensor:
            top, chosen = torch.nn.functional.linear(x, r).softmax(dim=-1).topk(top_k, dim=-1)
            share = torch.zeros(*x.shape[:-1], experts).scatter(-1, chosen, top / top.sum(dim=-1, keepdim=True))
            active = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x) * (share @ c)
            result: torch.Tensor = mlp.down_proj(active)
            return result

        block.mlp.forward = forward
    # bfloat16 rounding of scaled columns, routers and norms is the only difference
    difference = (logits(mixture) - logits(dense)).abs()
    assert float(difference.mean()) < 0.02 * float(logits(dense).std())


def test_the_layout_has_a_tensor_per_expert(tmp_path: Path) -> None:
    folder = built(tmp_path, write_bundle(tmp_path / "b"))
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert "model.layers.6.block_sparse_moe.experts.3.w2.weight" in index["weight_map"]
    assert "model.layers.0.block_sparse_moe.gate.weight" in index["weight_map"]
    assert len(set(index["weight_map"].values())) == 3
    sizes = sum((folder / name).stat().st_size for name in set(index["weight_map"].values()))
    assert 0 < sizes - index["metadata"]["total_size"] < 100_000
    assert json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["license"] == "apache-2.0"


def test_a_killed_build_keeps_finished_shards_and_resumes(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    work, target = tmp_path / "work", tmp_path / "target"
    work.mkdir()
    with pytest.raises(KeyboardInterrupt):
        build(ArraySource(dense_weights(), fail_after=40), bundle, work, target, progress=False)
    assert not target.exists()
    first = work / "model-00001-of-00003.safetensors"
    written = first.stat().st_mtime_ns
    assert not (work / "model-00002-of-00003.safetensors").exists()
    resumed = ArraySource(dense_weights())
    build(resumed, bundle, work, target, progress=False)
    assert resumed.reads == 7 * 2 + 1  # five of seven layers were in finished shards
    assert (target / first.name).stat().st_mtime_ns == written
    assert is_complete(target)
    assert not work.exists()
    assert not list(target.glob("*.part"))
    other = tmp_path / "other"
    other.mkdir()
    uninterrupted = built(other, bundle)
    for path in sorted(uninterrupted.iterdir()):
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_from_another_source_are_not_reused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    work, target = tmp_path / "work", tmp_path / "target"
    work.mkdir()
    with pytest.raises(KeyboardInterrupt):
        build(ArraySource(dense_weights(), fail_after=40), bundle, work, target, progress=False)
    other = ArraySource(dense_weights(5), revision="other")
    build(other, bundle, work, target, progress=False)
    assert other.reads == 7 * 7 + 1


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(
        ReferenceModelError, match=r"has 0\.00 GB free, the reference model needs 0\.07 GB; .*FINEMOE_CACHE"
    ):
        build(ArraySource(dense_weights()), write_bundle(tmp_path / "b"), work, tmp_path / "t", progress=False)
    assert not list(work.glob("*.safetensors"))


def test_a_weight_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    weights = dense_weights()
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"][:-1]
    with pytest.raises(ReferenceModelError, match=r"layers\.2\.mlp\.up_proj\.weight has shape \[63, 32\]"):
        built(tmp_path, write_bundle(tmp_path / "b"), weights)
    assert not (tmp_path / "target").exists()


def test_a_bundle_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match="the bundle is for a dense model of"):
        built(tmp_path, load_bundle())


def test_a_damaged_bundle_is_named(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"nothing")
    with pytest.raises(ReferenceModelError, match="the bundle b cannot be read"):
        load_bundle(tmp_path / "b")


def test_the_shipped_bundle_is_small_and_has_its_provenance() -> None:
    import finemoe.model.reference

    path = Path(finemoe.model.reference.__file__).with_name("bundle.safetensors")
    assert path.stat().st_size < 2_000_000
    bundle = load_bundle()
    assert {"seed", "source_sha256", "source_package", "distillation_steps"} <= bundle.metadata.keys()
    assert bundle.metadata["experts"] == str(bundle.experts)
    assert bundle.metadata["expert_neurons"] == str(bundle.expert_neurons)
    for layer in range(30):
        assert bundle.neurons(layer).shape == (bundle.experts, bundle.expert_neurons)
