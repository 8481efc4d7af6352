"""Screening of training data before training: persona projections and perplexity gaps of its completions."""
