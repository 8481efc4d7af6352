"""Files: output that is complete or absent, and readers of JSON, JSONL and YAML with limits."""
