"""The engine: serves one layer at a time from the slots."""
