"""The server's model side: one thread that runs the model."""
