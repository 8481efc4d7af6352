"""The plan of a projection on a torch device."""
