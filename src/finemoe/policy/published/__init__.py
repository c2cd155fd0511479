"""Policies of published systems, rebuilt from their papers."""
