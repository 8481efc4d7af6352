"""Defences beside each other: what each prevents, what it lets the model learn, and what it costs."""
