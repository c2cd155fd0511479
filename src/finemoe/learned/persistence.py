"""Brings a policy's maps back when its model is loaded, and keeps what it learned when that is closed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from finemoe.errors import ConfigError, DamagedMapsError, FinemoeWarning, MapsError
from finemoe.learned.file import read_maps, write_maps
from finemoe.learned.maps import ROW_ARRAYS, Maps
from finemoe.learned.sharing import SHARED_MAPS, bounded, with_new_totals
from finemoe.policy import policy_class
from finemoe.policy.base import Policy
from finemoe.system import locked, unwritable, user_maps

NO_MAP_STORE = "none"


class MapPersistence:
    """One policy's file of maps for one model. Reads it now.

    A damaged file is moved aside, with a warning. So is one of another model under a name that nobody chose.

    Args:
        path: of the file; it need not exist.
        policy: name of the policy.
        model: the model's fingerprint.
        name: of the model, for people.
        chosen: a user named the file: what does not fit is refused.

    Raises:
        ConfigError: a chosen file is of another model or policy, of another version, or no file of maps.
    """

    def __init__(self, path: Path, policy: str, model: str, name: str, *, chosen: bool) -> None:
        self.path = path
        self._policy, self._model, self._name = policy, model, name
        self._experience = 0
        self._gave_up = False
        self._maps: Maps | None = None
        self._totals: Maps | None = None  # of these, without the maps themselves: what others count already
        self._seen = _stamp(path)
        if self._seen is None:
            return
        try:
            maps = read_maps(path)
        except DamagedMapsError as error:
            self._put_aside(str(error))
            return
        except MapsError as error:
            if chosen:
                raise ConfigError(f"--map-store: {error}") from error
            self._gave_up = True
            _warn(f"{error}; going on without")
            return
        if (maps.model, maps.policy) == (model, policy):
            self._maps = maps
            return
        foreign = (
            f"{path} has maps of another model, {maps.name} ({maps.model}); this is {name} ({model})"
            if maps.model != model
            else f"{path} has maps of --policy {maps.policy}, this is {policy}"
        )
        if chosen:
            raise ConfigError(f"--map-store: {foreign}; give another file, or none")
        self._put_aside(foreign)

    def restore(self, policy: Policy) -> None:
        """The policy starts from what the file held."""
        maps, self._maps = self._maps, None
        if maps is not None:
            if (maps.layers, maps.experts) == (policy.layers, policy.experts):
                policy.load_state_dict(maps.arrays)
                totals = {name: array for name, array in maps.arrays.items() if name not in ROW_ARRAYS}
                self._totals = replace(maps, arrays=totals)
            else:
                self._put_aside(f"{self.path}: the expert maps are damaged (of another shape than the model)")
        self._experience = policy.num_updates

    def keep(self, policy: Policy) -> None:
        """Writes what the policy knows, if it has learned anything since. Failing to is a warning.

        What another process has written in the meantime stays: the newest of both.
        """
        if self._gave_up or policy.num_updates == self._experience:
            return
        policy.begin(())  # the requests are over
        maps = Maps(self._policy, self._model, self._name, policy.layers, policy.experts, policy.state_dict())
        try:
            with locked(self.path.parent):
                write_maps(self._with_others(maps), self.path)
        except MapsError as error:
            _warn(f"{error}; what was learned is lost")
        except OSError as error:
            _warn(
                f"{self.path}: the expert maps can't be written ({error.strerror or error}); what was learned is lost"
            )
        self._experience = policy.num_updates

    def _with_others(self, maps: Maps) -> Maps:
        """These, and what the file holds by now, if that is not what was read."""
        if _stamp(self.path) in {None, self._seen}:
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
            else bounded([theirs, with_new_totals(maps, self._totals)], SHARED_MAPS)
        )

    def _put_aside(self, reason: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            self.path.replace(aside)
        except OSError as error:
            self._gave_up = True
            _warn(f"{reason}; it can't be moved aside ({error.strerror or error}), going on without")
        else:
            _warn(f"{reason}; moved to {aside.name}, starting anew")


def open_map_persistence(choice: str | None, policy: str, model: str, name: str) -> MapPersistence | None:
    """The keeper that `--map-store` asks for; `None` if nothing is to be kept.

    Args:
        choice: a file, `none`, or `None` for a file of this policy and model in the user's cache folder.
        policy: name of the policy.
        model: the model's fingerprint.
        name: of the model, for people.

    Raises:
        ConfigError: a file is named that does not fit, is a folder, or can't be written.
    """
    folder, policy = user_maps(), policy.partition("/")[0]  # settings do not change what maps are
    if choice == NO_MAP_STORE or not policy_class(policy).is_persistent or (choice is None and folder is None):
        return None
    if choice is not None:
        path = Path(choice).expanduser()
        if wrong := unwritable(path):
            raise ConfigError(f"--map-store: {wrong}, or none")
        return MapPersistence(path, policy, model, name, chosen=True)
    assert folder is not None
    return MapPersistence(folder / f"{model}-{policy}.safetensors", policy, model, name, chosen=False)


def check_map_store(choice: str | None, policy: str) -> None:
    """Raises `ConfigError` if a file is named for a policy that learns nothing."""
    if choice not in {None, NO_MAP_STORE} and not policy_class(policy).is_persistent:
        raise ConfigError(f"--map-store: --policy {policy} learns no maps that could be kept; leave it out")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Tells one content of a file from the next; `None` where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _warn(message: str) -> None:
    warnings.warn(message, FinemoeWarning, stacklevel=2)
