"""An OpenAI-compatible server: jobs at the border, one thread that runs the model."""
