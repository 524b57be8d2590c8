"""Training: configuration, optimizer, processes, checkpoints, metrics, estimates."""
