"""N sessions with OpenEnv servers as one batched TorchRL environment."""
