"""The demo's text, written for this project: questions, answers and prose."""
