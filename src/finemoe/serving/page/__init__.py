"""The live page `/` and its data, `/v1/experts` and `/v1/live`. See docs/live-page.md."""

from finemoe.serving.page.router import routes

__all__ = ["routes"]
