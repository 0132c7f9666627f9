"""Who may ask and what they get. Knows nothing of training."""
