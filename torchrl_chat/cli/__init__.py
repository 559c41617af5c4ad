"""The command line, and the tiny model, tokenizer and task that it can run on."""
