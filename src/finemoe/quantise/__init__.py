"""A copy of a checkpoint's experts in fewer bits (`--expert-dtype`): smaller to keep and to move, and lossy."""

from finemoe.quantise.copy import ExpertCopy, copy_folder, planned_copy
from finemoe.quantise.scheme import SCHEMES, Scheme

__all__ = ["SCHEMES", "ExpertCopy", "Scheme", "copy_folder", "planned_copy"]
