"""Trainers of other libraries with defenses attached. `transformers.py` and `trl.py` need the library of that name."""
