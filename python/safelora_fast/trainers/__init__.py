"""Trainers of other libraries with defenses attached; each module needs the library that it is named after."""
