"""The server as a container: the files that OpenEnv's tools look for, and the application that they name."""
