"""The model thread of the server: continuous batching, sampling, and the job interface to the HTTP side."""
