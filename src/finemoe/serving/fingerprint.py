"""What answers depend on besides the request: `system_fingerprint`."""

from __future__ import annotations

from finemoe import __version__

FINGERPRINT = f"finemoe-{__version__}"
