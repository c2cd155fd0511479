"""The OpenAI-compatible server. `app` puts it together; `scheduler` runs the model; see docs/serving.md."""
