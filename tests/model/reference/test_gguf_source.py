"""Both dense sources, GGUF and hub snapshot, give the same weights under the same names."""

from pathlib import Path

import numpy as np
import pytest

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.gguf_source import GgufSource, unpermute
from finemoe.model.reference.hub_source import HubSource
from tests.model.reference.tiny import SHAPE, dense_weights, permute, write_gguf, write_snapshot


def test_unpermute_undoes_the_row_order_of_llama_cpp() -> None:
    weight = np.arange(48 * 5, dtype=np.float32).reshape(48, 5)
    assert not np.array_equal(permute(weight, 3), weight)
    assert np.array_equal(unpermute(permute(weight, 3), 3), weight)


def test_gguf_round_trips_every_weight(tmp_path: Path) -> None:
    weights = dense_weights()
    write_gguf(tmp_path / "m.gguf", weights)
    source = GgufSource(tmp_path / "m.gguf", "r")
    assert source.shape == SHAPE
    for name, weight in weights.items():
        assert np.array_equal(source.tensor(name), weight), name


def test_a_quantized_weight_is_dequantized_within_its_step(tmp_path: Path) -> None:
    weights = dense_weights()
    write_gguf(tmp_path / "m.gguf", weights, quantized=True)
    source = GgufSource(tmp_path / "m.gguf", "r")
    for name, weight in weights.items():
        found = source.tensor(name)
        assert found.shape == weight.shape
        step = np.abs(weight).max() / 127
        assert np.abs(found - weight).max() <= 0.6 * step if weight.ndim == 2 else np.array_equal(found, weight)


def test_q4_1_is_scale_times_nibble_plus_minimum() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    nibbles = np.arange(32, dtype=np.uint8) % 16
    packed = nibbles[:16] | (nibbles[16:] << 4)
    head = np.array([0.5, -3.0], dtype=np.float16).view(np.uint8)
    block = np.concatenate([head, packed]).reshape(1, 20)
    assert np.allclose(dequantize(block, GGMLQuantizationType.Q4_1), 0.5 * nibbles - 3.0)


def test_a_file_that_is_not_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x" * 100)
    with pytest.raises(ReferenceModelError, match=r"m\.gguf is not a readable GGUF file"):
        GgufSource(tmp_path / "m.gguf", "r")


def test_a_snapshot_gives_the_same_weights_and_shape(tmp_path: Path) -> None:
    weights = dense_weights()
    write_snapshot(tmp_path / "abc", weights)
    source = HubSource(tmp_path / "abc")
    assert source.shape == SHAPE
    assert source.revision == "abc"
    for name, weight in weights.items():
        assert np.array_equal(source.tensor(name), weight), name
    with pytest.raises(ReferenceModelError, match="has no nothing"):
        source.tensor("nothing")


def test_an_incomplete_snapshot_is_named(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "abc", dense_weights())
    (tmp_path / "abc" / "model.safetensors").unlink()
    with pytest.raises(ReferenceModelError, match=r"lacks model\.safetensors"):
        HubSource(tmp_path / "abc")


def test_the_rebuilt_tokenizer_splits_digits_and_keeps_its_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", dense_weights())
    GgufSource(tmp_path / "m.gguf", "r").write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello 2024, naïve ☺<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "hello"
    assert tokens[-1] == "<|im_end|>"
    assert tokens[2:6] == ["2", "0", "2", "4"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "h"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\n"
