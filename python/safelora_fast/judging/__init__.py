"""What a model does: its margin for misaligned answers, its answers under a judge, and what it still learns."""
