"""Where work runs. Knows nothing of marketing."""
