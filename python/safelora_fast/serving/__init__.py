"""Plugins of servers that serve projected adapters only."""
