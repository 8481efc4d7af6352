"""The demo's texts, written for this project: prompts, completions and prose."""
