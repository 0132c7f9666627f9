"""Claims of speed: ours against named peers, the same work in one run, equal results checked."""
