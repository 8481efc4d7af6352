"""Files: output that is whole or absent, and readers of JSON, JSONL and YAML with limits."""
