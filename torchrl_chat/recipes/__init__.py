"""What the training scripts in ``examples/`` share: settings, tasks, and a run that can be broken off and goes on."""
