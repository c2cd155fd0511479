"""Replay of recorded routing under a virtual clock and a modelled link. Contains no policy."""
