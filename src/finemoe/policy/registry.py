"""Names of policies, with settings and without parts: `expert-map/distance=6`, `finemoe/no-own/no-prefetch`."""

from __future__ import annotations

from typing import Any

from finemoe.errors import ConfigError
from finemoe.policy.base import Policy


def parse(policy: str, known: dict[str, type[Policy]]) -> tuple[type[Policy], dict[str, Any]]:
    """The class behind a name, and the options for its constructor that the name asks for.

    Raises:
        ConfigError: no such policy, part or setting; the message lists those that there are.
    """
    name, *words = policy.split("/")
    if name not in known:
        raise ConfigError(f"--policy: unknown policy {name!r}; choose one of {', '.join(known)}")
    kind, options = known[name], dict[str, Any]()
    without: set[str] = set()
    for word in words:
        key, _, value = word.partition("=")
        if key in kind.settings and value.isdecimal() and int(value) > 0:
            options[key] = int(value)
        elif word.startswith("no-") and word[3:] in kind.parts:
            without.add(word[3:])
        else:
            offered = [f"{key}=N" for key in kind.settings] + [f"no-{part}" for part in kind.parts]
            raise ConfigError(
                f"--policy: {name}/{word}: {name} "
                + (f"takes {', '.join(offered)}" if offered else "has no settings, and no parts to switch off")
            )
    if without:
        options["without"] = frozenset(without)
    return kind, options
