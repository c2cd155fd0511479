"""Experts on GPUs: device slots, copies from pinned host memory, and layers that run without waiting for the device."""
