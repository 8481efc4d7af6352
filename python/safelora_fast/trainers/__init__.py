"""Trainers of other libraries with defences attached; each module needs the library that it is named after."""
