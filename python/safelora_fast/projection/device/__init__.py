"""Projection and safe subspaces on a torch device."""
