"""Model, data and the training step on this machine; knows no network."""
