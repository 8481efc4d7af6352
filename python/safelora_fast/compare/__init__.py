"""Compare defenses: what each prevents, what it lets the model learn, and what it costs."""
