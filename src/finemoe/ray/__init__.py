"""Earlier import path of the Ray Serve application: `finemoe.ray:app` in existing Ray Serve configs still works.

New configs should name `finemoe.serving.ray:app`.
"""

from finemoe.serving.ray import app

__all__ = ["app"]
