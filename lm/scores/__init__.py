"""What a model's answers are worth: counts of classes, and scores of texts."""
