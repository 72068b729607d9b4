"""Models on disk: finds, opens, compares and writes them."""
