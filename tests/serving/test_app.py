"""Two servers of one model that share maps through a folder."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.learned import FolderMaps
from finemoe.serving.app import Service, open_service
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Job
from tests.chat_model import make_chat_model
from tests.serving.conftest import a_prompt
from tests.serving.recording_listener import RecordingListener


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("service") / "my-model")


def configs(folder: Path, shared: Path, policy: str = "finemoe") -> tuple[LoadConfig, ServeConfig]:
    load = LoadConfig(model=str(folder), policy=policy, expert_memory="50%")
    return load, ServeConfig(cache_bytes="16MiB", max_batch_tokens=64, shared_maps=str(shared), share_every_s=3600.0)


def answer(service: Service, seed: int = 0) -> None:
    listener = RecordingListener()
    service.worker.submit(Job("job", a_prompt(5, seed), 8), listener)
    listener.wait("job")


def test_a_second_server_starts_with_the_maps_of_the_first(folder: Path, tmp_path: Path) -> None:
    load, config = configs(folder, tmp_path)
    with open_service(load, config, page=False) as first:
        assert first.model.finemoe.num_updates == 0
        answer(first)
        known = first.model.finemoe.learned()
        assert known is not None
    with open_service(load, config, page=False) as second:
        assert second.model.finemoe.num_updates == len(known)
        learned = second.model.finemoe.learned()
        assert learned is not None and "openings" in learned.arrays
        answer(second, seed=1)
    names = [thread.name for thread in threading.enumerate()]
    assert "finemoe-sharing" not in names and "finemoe-model" not in names
    pulled = FolderMaps(str(tmp_path), learned.model, "finemoe").pull()
    assert pulled is not None and pulled.maps is not None
    assert len(pulled.maps) > len(learned)


def test_a_failing_store_does_not_stop_the_server(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    caplog.set_level(logging.WARNING)
    load, config = configs(folder, tmp_path / "file" / "maps")
    with open_service(load, config, page=False) as service:
        answer(service)
    warnings = [each.getMessage() for each in caplog.records if each.name == "finemoe.serving.map_exchange"]
    assert len(warnings) == 1 and warnings[0].startswith("maps can't be shared (")


def test_a_policy_without_maps_is_refused(folder: Path, tmp_path: Path) -> None:
    load, config = configs(folder, tmp_path, "lru")
    with (
        pytest.raises(ConfigError, match=r"^--shared-maps: --policy lru learns no maps"),
        open_service(load, config, page=False),
    ):
        pass
