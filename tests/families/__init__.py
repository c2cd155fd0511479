"""One tiny model for every mixture-of-experts family that transformers ships."""
