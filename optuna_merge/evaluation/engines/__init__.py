"""The engines: transformers and vLLM."""
