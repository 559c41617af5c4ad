"""OpenEnv's chat environment: a conversation, or any TorchRL environment of this package, by OpenEnv's interface."""
