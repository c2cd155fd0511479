"""Loading and closing, and the errors of loading."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM, modeling_utils

import finemoe
from finemoe.engine.expert_layer import LazyParameter
from finemoe.errors import BudgetError, CheckpointError, ConfigError, FinemoeError, UnsupportedModelError
from finemoe.store import slot_pool as pool
from tests.tiny import Make, answer, configured, eager, experts_modules, logits


def reader_threads() -> int:
    return sum(thread.name.startswith("finemoe-reader") for thread in threading.enumerate())


def refused(error: type[FinemoeError], *arguments: Any, **options: Any) -> str:
    """The one-line message of a load that must fail; checks that it frees everything."""
    before = reader_threads()
    original = modeling_utils.convert_and_load_state_dict_in_model
    with pytest.raises(error) as caught:
        finemoe.load(*arguments, **options)
    assert reader_threads() == before
    assert modeling_utils.convert_and_load_state_dict_in_model is original
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_loaded_model_is_an_instance_of_its_transformers_class(chat_folder: Path) -> None:
    with finemoe.load(chat_folder) as model:
        assert isinstance(model, MixtralForCausalLM)
        assert type(model).__name__ == "MixtralForCausalLM"
        assert type(model).__module__ == MixtralForCausalLM.__module__
        assert not model.training
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert "MixtralExperts" in repr(model)


def test_expert_weights_are_no_parameters(chat_folder: Path) -> None:
    with finemoe.load(chat_folder) as model:
        assert not [name for name, _ in model.named_parameters() if "gate_up_proj" in name]
        for module in experts_modules(model):
            assert isinstance(module.gate_up_proj, LazyParameter)
            assert module.gate_up_proj.shape[0] == len(module.gate_up_proj) == 8


def test_close_frees_threads_and_files_and_refuses_further_use_in_one_line(chat_folder: Path) -> None:
    before = reader_threads()
    model = finemoe.load(chat_folder, reader_threads=3)
    assert reader_threads() == before + 3
    model.close()
    model.close()
    assert reader_threads() == before
    with pytest.raises(FinemoeError, match=r"^this model was closed: .*load it again$"):
        answer(model)
    assert model.finemoe.stats().accesses == 0


def test_a_with_block_closes_after_an_error(chat_folder: Path) -> None:
    before = reader_threads()
    with pytest.raises(RuntimeError, match="in the block"), finemoe.load(chat_folder):
        raise RuntimeError("in the block")
    assert reader_threads() == before


def test_an_unreferenced_model_frees_its_threads(chat_folder: Path) -> None:
    before = reader_threads()
    model = finemoe.load(chat_folder)
    answer(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert reader_threads() == before


def test_close_waits_for_a_running_layer_and_ends_the_generation(chat_folder: Path) -> None:
    model = finemoe.load(chat_folder, expert_memory="20%")
    outcome: list[BaseException | None] = []
    started = threading.Event()

    def generate() -> None:
        try:
            model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=400, eos_token_id=None, pad_token_id=0)
        except BaseException as error:  # noqa: BLE001 - its type is checked below
            outcome.append(error)
        else:
            outcome.append(None)

    layer = experts_modules(model)[0].finemoe_layer
    run = layer.run

    def signalled(*arguments: Any) -> Any:
        started.set()
        return run(*arguments)

    layer.run = signalled
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    assert started.wait(60)
    model.close()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(outcome[0], FinemoeError), outcome


def test_saving_is_refused_with_an_alternative(chat_folder: Path, tmp_path: Path) -> None:
    with finemoe.load(chat_folder) as model:
        with pytest.raises(FinemoeError, match=r"^an offloaded model can't be saved.*load it with transformers"):
            model.save_pretrained(tmp_path)
        with pytest.raises(FinemoeError, match="can't be saved"):
            model.push_to_hub("nobody/nothing")
    assert not list(tmp_path.iterdir())


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "LlamaForCausalLM can't be offloaded: it is a dense model, without routed experts" in refused(
        UnsupportedModelError, tmp_path
    )


@pytest.mark.parametrize("family", ["llama4_text", "dbrx"])
def test_experts_outside_the_registry_are_refused(tiny: Make, family: str) -> None:
    assert "are not covered by transformers' experts registry" in refused(UnsupportedModelError, tiny(family))


def test_an_unknown_model_type_is_refused_with_the_version_of_transformers(chat_folder: Path, tmp_path: Path) -> None:
    folder = configured(chat_folder, tmp_path, model_type="not_yet_made")
    message = refused(CheckpointError, folder)
    assert f"{folder / 'config.json'}: transformers 5." in message
    assert message.endswith("knows no model type 'not_yet_made'")


@pytest.mark.parametrize("model_type", [None, [], {}, 7])
def test_an_invalid_model_type_is_refused(chat_folder: Path, tmp_path: Path, model_type: object) -> None:
    folder = configured(chat_folder, tmp_path, model_type=model_type)
    assert "config.json" in refused(CheckpointError, folder)


def test_remote_code_is_refused_unless_it_is_trusted(chat_folder: Path, tmp_path: Path) -> None:
    folder = configured(chat_folder, tmp_path, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise SystemExit('remote code ran')")
    message = refused(UnsupportedModelError, folder)
    assert message == f"{folder} needs modelling code of its own; if you trust it, give --trust-remote-code"


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "null", "\0"])
def test_a_damaged_config_is_named(chat_folder: Path, tmp_path: Path, content: str) -> None:
    folder = configured(chat_folder, tmp_path)
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refused(CheckpointError, folder)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"num_experts_per_tok": 99}],
)
def test_an_inconsistent_config_is_refused(chat_folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    refused(FinemoeError, configured(chat_folder, tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"num_local_experts": 16}, {"num_hidden_layers": 4}, {"intermediate_size": 48}])
def test_weights_that_do_not_fit_the_config_are_refused(
    chat_folder: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    refused(CheckpointError, configured(chat_folder, tmp_path, **changes))


def test_an_unknown_policy_is_refused_before_anything_is_read() -> None:
    assert refused(ConfigError, "/no/such/model", policy="fifo").startswith("--policy: unknown policy 'fifo'")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    assert refused(CheckpointError, tmp_path / "nowhere").startswith("--model: there is no folder")


@pytest.mark.parametrize("expert_memory", ["1", "1%", "3KiB"])
def test_a_budget_below_the_minimum_is_refused_and_the_minimum_works(chat_folder: Path, expert_memory: str) -> None:
    message = refused(BudgetError, chat_folder, expert_memory=expert_memory)
    assert message.startswith(f"--expert-memory: {expert_memory} holds ")
    least = message.partition("for one step: ")[2].split()[0]
    with finemoe.load(chat_folder, expert_memory=least) as model:
        assert model.finemoe.stats().slots == 4  # three active experts, one in flight
        assert torch.equal(answer(model), answer(eager(chat_folder)))
    assert refused(BudgetError, chat_folder, expert_memory=str(int(least) - 1)).startswith("--expert-memory: ")


def test_a_budget_beyond_the_machine_is_refused(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pool, sys.modules["finemoe.model.loader"]):
        monkeypatch.setattr(module, "available_bytes", lambda: 1000)
    assert refused(BudgetError, chat_folder, expert_memory="all").startswith("--expert-memory: ")


def test_direct_reading_is_refused_if_the_system_lacks_it(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_DIRECT")
    message = refused(CheckpointError, chat_folder, io="direct")
    assert "--io direct" in message
    assert "None" not in message


def test_a_plain_transformers_load_in_another_thread_is_not_affected(
    chat_folder: Path, eager_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling_utils.convert_and_load_state_dict_in_model
    outcome: list[torch.Tensor] = []

    def with_concurrent_load(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():  # finemoe.load is inside transformers' loader
            other = threading.Thread(target=lambda: outcome.append(logits(eager(chat_folder))))
            other.start()
            other.join(60)
        return original(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "convert_and_load_state_dict_in_model", with_concurrent_load)
    with finemoe.load(chat_folder) as model:
        assert torch.equal(logits(model), logits(eager_model))
    assert torch.equal(outcome[0], logits(eager_model))


def test_verify_changes_no_answer(chat_folder: Path, eager_model: Any) -> None:
    with finemoe.load(chat_folder, verify=True) as model:
        assert torch.equal(answer(model), answer(eager_model))
