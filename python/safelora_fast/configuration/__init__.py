"""Settings in YAML files: documents with line numbers, schemas, and the sections of defenses and monitors."""
