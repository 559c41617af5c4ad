"""Clients of OpenEnv servers: one session each, its connections on an event loop in a thread of their own."""
