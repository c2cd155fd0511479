"""Importing other layouts: fields are kept, absent ones are marked missing, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.errors import TraceError
from finemoe.trace import open_trace
from finemoe.trace.importing import TraceMetadata, import_trace

LAYERS, ACTIVE = 3, 2
TOKENS = (["a", "b", "a"], ["c", "a"])


def imported(source: Path, target: Path, metadata: TraceMetadata | None = None, **options: Any) -> Any:
    """Imports a source and opens the trace."""
    importing = import_trace(source, target, metadata, **options)
    assert [*importing]
    return open_trace(target)


def refused(source: Path, target: Path) -> str:
    with pytest.raises(TraceError) as error:
        list(import_trace(source, target))
    assert "\n" not in str(error.value)
    assert not target.exists()
    assert not target.with_name(f"{target.name}.partial").exists()
    return str(error.value)


def arrays(folder: Path, **changes: Any) -> Path:
    """A folder of arrays, two requests of three and two rows."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    ids = rng.random((5, LAYERS, 7)).argsort(2)[:, :, :ACTIVE].astype(np.uint8)
    ids[0, 0] = 6, 1
    probs = np.tile(np.array([0.75, 0.25], np.float16), (5, LAYERS, 1))
    tables: dict[str, Any] = {"expert_ids": ids, "probs": probs, "offsets": np.array([0, 3, 5])} | changes
    np.savez_compressed(folder / "routing.npz", **{name: table for name, table in tables.items() if table is not None})
    lines = [json.dumps({"prompt": "hm", "input_tokens": tokens}) for tokens in TOKENS]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_arrays_become_decode_only_requests(tmp_path: Path) -> None:
    folder = arrays(tmp_path / "some-moe")
    with imported(folder, tmp_path / "it.trace") as trace:
        assert (trace.header.model, trace.header.experts, trace.header.fields) == ("some-moe", 7, ("weights",))
        assert trace.header.vocabulary == ("a", "b", "c")
        assert trace.decode_only
        assert [request.token_ids.tolist() for request in trace] == [[0, 1, 0], [2, 0]]
        assert trace.request(0).rows.tolist() == [0, 1, 2, 3]
        assert trace.request(0).expert_ids[0, 0].tolist() == [6, 1]
        assert trace.request(0).weights[0, 0].tolist() == [0.75, 0.25]
        assert trace.request(0).probs is None


def test_the_npz_may_be_given_instead_of_its_folder(tmp_path: Path) -> None:
    file = arrays(tmp_path / "some-moe") / "routing.npz"
    metadata = TraceMetadata(model="a/model", experts=32, licence="Apache-2.0")
    importing = import_trace(file, tmp_path / "it.trace", metadata)
    assert not importing.notices
    assert sum(importing) == 5
    with open_trace(tmp_path / "it.trace") as trace:
        assert (trace.header.model, trace.header.experts, trace.header.licence) == ("a/model", 32, "Apache-2.0")


def test_a_derived_number_of_experts_gives_a_notice(tmp_path: Path) -> None:
    importing = import_trace(arrays(tmp_path / "m"), tmp_path / "it.trace")
    assert ["--experts" in notice for notice in importing.notices] == [True]


def test_weights_are_sorted(tmp_path: Path) -> None:
    probs = np.tile(np.array([0.25, 0.75], np.float16), (5, LAYERS, 1))
    with imported(arrays(tmp_path / "m", probs=probs), tmp_path / "it.trace") as trace:
        assert trace.request(0).expert_ids[0, 0].tolist() == [1, 6]
        assert trace.request(0).weights[0, 0].tolist() == [0.75, 0.25]


def test_arrays_without_probs_have_no_weights(tmp_path: Path) -> None:
    with imported(arrays(tmp_path / "m", probs=None), tmp_path / "it.trace") as trace:
        assert trace.request(0).weights is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"offsets": None}, "no array offsets"),
        ({"offsets": np.array([0, 2, 5])}, "request 0 has 3 input_tokens for 2 rows"),
        ({"offsets": np.array([0, 3, 4])}, "offsets"),
        ({"offsets": np.array([0, 3, 4, 5])}, "has 2 requests"),
        ({"expert_ids": np.zeros((5, 3))}, "expert_ids"),
        ({"probs": np.zeros((5, 3, 4), np.float16)}, "probs"),
    ],
)
def test_damaged_arrays_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    assert named in refused(arrays(tmp_path / "m", **changes), tmp_path / "it.trace")


def test_missing_or_damaged_tokens_are_refused(tmp_path: Path) -> None:
    prompts = arrays(tmp_path / "m") / "prompts.jsonl"
    for content, named in (('{"input_tokens": [1]}', "strings"), ("{", "damaged"), ("{}", "damaged")):
        prompts.write_text(content)
        assert named in refused(tmp_path / "m", tmp_path / "it.trace")
    prompts.unlink()
    assert "is missing" in refused(tmp_path / "m", tmp_path / "it.trace")
    (tmp_path / "m" / "routing.npz").write_bytes(b"PK\x03\x04nonsense")
    assert "can't be read" in refused(tmp_path / "m", tmp_path / "it.trace")


def fingerprint(full: bool = False, first: int = 3) -> dict[str, Any]:
    """One request of the JSON layout: two decoded tokens, the inputs at positions `first` and `first + 1`."""
    text = ["<start>", "hm", "<assistant>", "well", ",", "<end>"]

    def layer(step: int, index: int) -> dict[str, Any]:
        experts = {"selected_experts": [index + step, 5], "selected_probs": [0.75, 0.25]}
        return experts | ({"full_scores": [0.1, 0.2, 0.1, 0.1, 0.1, 0.4]} if full else {})

    steps = [
        {f"token_{first + step}": {f"layer_{index}": layer(step, index) for index in (0, 1, 2)}} for step in (0, 1)
    ]
    return {"row_index": 7, "full_text": text, "generated_only": text[3:], "router_data": steps}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_fingerprints_become_decode_only_requests(tmp_path: Path, full: bool, listed: bool) -> None:
    folder = tmp_path / "prints" / "science" / "physics"
    folder.mkdir(parents=True)
    (folder / "True_False.json").write_text('{"sample_count": 1}')  # a summary
    content = [fingerprint(full), fingerprint(full)] if listed else fingerprint(full)
    (folder / "True_False_examples.json").write_text(json.dumps(content))
    with imported(tmp_path / "prints", tmp_path / "it.trace") as trace:
        assert len(trace) == 1 + listed
        request = trace.request(len(trace) - 1)
        assert (trace.header.layers, trace.header.experts, trace.header.active) == (3, 6, 2)
        assert [trace.header.vocabulary[token] for token in request.token_ids] == ["well", ","]
        assert request.expert_ids.tolist() == [[[0, 5], [1, 5], [2, 5]], [[1, 5], [2, 5], [3, 5]]]
        assert request.weights[1, 2].tolist() == [0.75, 0.25]
        assert (request.probs is not None) == full
        if full:
            assert request.probs[0, 0] == pytest.approx([0.1, 0.2, 0.1, 0.1, 0.1, 0.4], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"full_text": "one string"}, "not split into tokens"),
        ({"router_data": []}, "empty"),
        ({"router_data": [{"token_99": {"layer_0": {}}}]}, "damaged"),
        ({"router_data": [{"token_3": {"layer_0": {"selected_experts": [1]}}}]}, "damaged"),
    ],
)
def test_damaged_fingerprints_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps(fingerprint() | change))
    assert named in refused(tmp_path / "one.json", tmp_path / "it.trace")


def test_fingerprints_of_two_models_are_refused(tmp_path: Path) -> None:
    other = fingerprint()
    for step in other["router_data"]:
        for layers in step.values():
            del layers["layer_2"]
    (tmp_path / "one.json").write_text(json.dumps([fingerprint(), other]))
    assert "different shapes" in refused(tmp_path, tmp_path / "it.trace")


def simllm(version: str = "v1", weighted: bool = True, model: str = "org/a-moe") -> list[dict[str, Any]]:
    """Rows of two requests that ran interleaved: two prompt tokens and one decoded, then one prompt token."""
    provenance = {"model_id": model, "expert_count": 6, "top_k": 2, "moe_layer_indices": [1, 2]}

    def token(request: str, phase: str, index: int) -> dict[str, Any]:
        weights = {"gate_weights": [0.25, 0.75]} if weighted else {}
        routing = [{"layer_index": layer, "expert_ids": [layer + index, 5]} | weights for layer in (1, 2)]
        return {
            "row_type": "token", "request_id": request, "phase": phase, "token_id": 40 + index, "token_index": index,
            "routing": routing,
        }  # fmt: skip

    return [
        {"row_type": "header", "schema": f"simllm-preplay-trace-{version}", "provenance": provenance},
        {"row_type": "request", "request_id": "p0"},
        {"row_type": "request", "request_id": "p1"},
        {"row_type": "request", "request_id": "never ran"},
        token("p0", "prefill", 1),
        token("p1", "prefill", 0),
        token("p0", "prefill", 0),
        {"row_type": "kv-event", "request_id": "p0"},
        token("p0", "decode", 0),
        {"row_type": "footer", "prefill_forward_token_count": 3, "decode_forward_token_count": 1},
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("weighted", [False, True])
def test_simllm_traces_have_prefill_and_decode(tmp_path: Path, weighted: bool) -> None:
    file = write_lines(tmp_path / "run.jsonl", simllm(weighted=weighted))
    with imported(file, tmp_path / "it.trace") as trace:
        assert (trace.header.model, trace.header.layers, trace.header.experts) == ("org/a-moe", 2, 6)
        assert len(trace) == 2
        first, second = trace
        assert (first.phases.tolist(), first.rows.tolist()) == ([0, 1], [0, 2, 3])
        assert (second.phases.tolist(), second.rows.tolist()) == ([0], [0, 1])
        assert first.token_ids.tolist() == [40, 41, 40]
        assert trace.header.vocabulary is None
        expected = [5, 2] if weighted else [2, 5]  # sorted by weight, if there are weights
        assert first.expert_ids[1, 0].tolist() == expected
        assert (first.weights is not None) == weighted


def test_a_folder_of_simllm_traces_is_one_trace_and_weights_are_all_or_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", simllm())
    write_lines(tmp_path / "b.jsonl", simllm("v2", weighted=False))
    write_lines(tmp_path / "c.jsonl", [{"prompt": "another file"}])
    importing = import_trace(tmp_path, tmp_path / "it.trace")
    assert [notice.partition(":")[0] for notice in importing.notices] == ["weights"]
    assert (len(importing), sum(importing)) == (4, 8)
    with open_trace(tmp_path / "it.trace") as trace:
        assert trace.header.fields == ()


@pytest.mark.parametrize(
    ("row", "change", "named"),
    [
        (0, {"schema": "simllm-preplay-trace-v9"}, "v9"),
        (0, {"provenance": {}}, ":1:"),
        (4, {"token_id": None}, ":5:"),
        (4, {"phase": "warmup"}, ":5:"),
        (4, {"request_id": "stranger"}, ":5:"),
        (4, {"routing": []}, ":5:"),
        (9, {"decode_forward_token_count": 9}, "states 9 decode rows"),
        (9, {"row_type": "note"}, "cut off"),
    ],
)
def test_damaged_simllm_traces_are_refused(tmp_path: Path, row: int, change: dict[str, Any], named: str) -> None:
    rows = simllm()
    rows[row] |= change
    file = write_lines(tmp_path / "run.jsonl", rows)
    assert named in refused(file, tmp_path / "it.trace")


def test_simllm_traces_of_two_models_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", simllm())
    write_lines(tmp_path / "b.jsonl", simllm(model="org/other"))
    assert "another model" in refused(tmp_path, tmp_path / "it.trace")


def test_the_error_for_an_unknown_layout_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "readme.json").write_text("{}")
    message = refused(tmp_path / "src", tmp_path / "it.trace")
    assert all(word in message for word in ("routing.npz", "router_data", "simllm"))
    assert "no such file" in refused(tmp_path / "none", tmp_path / "it.trace")


def test_an_import_replaces_a_trace_only_with_overwrite(tmp_path: Path) -> None:
    source, target = arrays(tmp_path / "m"), tmp_path / "it.trace"
    list(import_trace(source, target))
    with pytest.raises(TraceError, match="--force"):
        list(import_trace(source, target))
    list(import_trace(source, target, overwrite=True))


def test_an_unfinished_import_leaves_no_file(tmp_path: Path) -> None:
    for _ in import_trace(arrays(tmp_path / "m"), tmp_path / "it.trace"):
        break
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
