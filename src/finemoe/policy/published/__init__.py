"""Published policies, reproduced from their papers; each class lists what it takes over and where it deviates."""
