"""Runs one MoE layer at a time: pins resident experts, loads missing ones, and computes each as it becomes ready."""
