"""A policy with limits, checked against the results of the other commands."""
