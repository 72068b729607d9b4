"""Models on disk: found, opened lazily, compared and written."""
