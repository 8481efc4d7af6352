"""Evaluation of models: free-form answers scored by a judge, benchmarks, and the operator-swap task."""
