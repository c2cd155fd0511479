"""Restores a policy's maps from a file when a model is loaded, and saves them when it is closed (`--map-store`)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from finemoe.errors import ConfigError, DamagedMapsError, FinemoeWarning, MapsError
from finemoe.learned.file import read_maps, write_maps
from finemoe.learned.maps import ROW_ARRAYS, Maps
from finemoe.learned.sharing import SHARED_MAPS, merge_newest, with_new_totals
from finemoe.policy import policy_class
from finemoe.policy.base import Policy
from finemoe.system import locked, unwritable, user_maps

NO_MAP_STORE = "none"  # value of --map-store: no maps are read or written


class MapPersistence:
    """The map file of one policy and model. The file is read by the constructor.

    A damaged file is renamed, with a warning; so is a file for another model or policy, unless the user named it.

    Args:
        path: of the file; it need not exist.
        policy: name of the policy.
        model: the model's fingerprint.
        name: the model's name, for display.
        explicit: the user named the file: one that does not fit is an error.

    Raises:
        ConfigError: an explicit file is for another model or policy, of another version, or not a file of maps.
    """

    def __init__(self, path: Path, policy: str, model: str, name: str, *, explicit: bool) -> None:
        self.path = path
        self._policy, self._model, self._name = policy, model, name
        self._saved_updates = 0
        self._disabled = False
        self._maps: Maps | None = None  # as read, until restored
        self._totals: Maps | None = None  # arrays other than the maps, as read: already counted in the file
        self._stamp = _stamp(path)
        if self._stamp is None:
            return
        try:
            maps = read_maps(path)
        except DamagedMapsError as error:
            self._move_aside(str(error))
            return
        except MapsError as error:
            if explicit:
                raise ConfigError(f"--map-store: {error}") from error
            self._disabled = True
            _warn(f"{error}; going on without")
            return
        if (maps.model, maps.policy) == (model, policy):
            self._maps = maps
            return
        mismatch = (
            f"{path} has maps of another model, {maps.name} ({maps.model}); this is {name} ({model})"
            if maps.model != model
            else f"{path} has maps of --policy {maps.policy}, this is {policy}"
        )
        if explicit:
            raise ConfigError(f"--map-store: {mismatch}; give another file, or none")
        self._move_aside(mismatch)

    def restore(self, policy: Policy) -> None:
        """Loads what was read into the policy, if there was anything."""
        maps, self._maps = self._maps, None
        if maps is not None:
            if (maps.layers, maps.experts) == (policy.layers, policy.experts):
                policy.load_state_dict(maps.arrays)
                totals = {name: array for name, array in maps.arrays.items() if name not in ROW_ARRAYS}
                self._totals = replace(maps, arrays=totals)
            else:
                self._move_aside(f"{self.path}: the expert maps are damaged (of another shape than the model)")
        self._saved_updates = policy.num_updates

    def save(self, policy: Policy) -> None:
        """Writes the policy's maps if it has learned anything since `restore`. A failure is only a warning.

        If another process has written the file in the meantime, its maps are merged with these; the newest are kept.
        """
        if self._disabled or policy.num_updates == self._saved_updates:
            return
        policy.begin(())  # all requests have ended
        maps = Maps(self._policy, self._model, self._name, policy.layers, policy.experts, policy.state_dict())
        try:
            with locked(self.path.parent):
                write_maps(self._merged_with_file(maps), self.path)
        except MapsError as error:
            _warn(f"{error}; what was learned is lost")
        except OSError as error:
            _warn(
                f"{self.path}: the expert maps can't be written ({error.strerror or error}); what was learned is lost"
            )
        self._saved_updates = policy.num_updates

    def _merged_with_file(self, maps: Maps) -> Maps:
        """These maps, merged with those in the file if it has changed since it was read."""
        if _stamp(self.path) in {None, self._stamp}:
            return maps
        try:
            theirs = read_maps(self.path)
        except DamagedMapsError:
            return maps
        if (theirs.policy, theirs.model) != (maps.policy, maps.model):
            raise MapsError(f"{self.path} has become a file of other maps, of {theirs.name} under {theirs.policy}")
        return (
            maps
            if maps.incompatibility(theirs)
            else merge_newest([theirs, with_new_totals(maps, self._totals)], SHARED_MAPS)
        )

    def _move_aside(self, reason: str) -> None:
        target = self.path.with_name(f"{self.path.name}.damaged")
        try:
            self.path.replace(target)
        except OSError as error:
            self._disabled = True
            _warn(f"{reason}; it can't be moved aside ({error.strerror or error}), going on without")
        else:
            _warn(f"{reason}; moved to {target.name}, starting empty")


def open_map_persistence(choice: str | None, policy: str, model: str, name: str) -> MapPersistence | None:
    """The map file for a value of `--map-store`; `None` if maps are not to be saved.

    Args:
        choice: a file, `none`, or `None` for a file of this policy and model in the user's cache folder.
        policy: name of the policy.
        model: the model's fingerprint.
        name: the model's name, for display.

    Raises:
        ConfigError: the named file does not fit, is a folder, or can't be written.
    """
    folder, policy = user_maps(), policy.partition("/")[0]  # options of a policy do not change its maps
    if choice == NO_MAP_STORE or not policy_class(policy).is_persistent or (choice is None and folder is None):
        return None
    if choice is not None:
        path = Path(choice).expanduser()
        if reason := unwritable(path):
            raise ConfigError(f"--map-store: {reason}, or none")
        return MapPersistence(path, policy, model, name, explicit=True)
    assert folder is not None
    return MapPersistence(folder / f"{model}-{policy}.safetensors", policy, model, name, explicit=False)


def check_map_store(choice: str | None, policy: str) -> None:
    """Raises `ConfigError` if `--map-store` names a file for a policy that is not persistent."""
    if choice not in {None, NO_MAP_STORE} and not policy_class(policy).is_persistent:
        raise ConfigError(f"--map-store: --policy {policy} learns no maps that could be kept; leave it out")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Identity of a file's contents, to detect changes; `None` if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _warn(message: str) -> None:
    warnings.warn(message, FinemoeWarning, stacklevel=2)
