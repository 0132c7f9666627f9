"""What work is done: one verb a module. Knows nothing of HTTP."""
