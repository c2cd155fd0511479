"""Runs one MoE layer at a time: pins resident experts, waits for missing ones, and computes each as it becomes ready."""
